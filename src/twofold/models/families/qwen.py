"""Qwen 2 and Qwen 3 donors: Llama's block, with biases on q, k, v (Qwen 2) or q/k norms (Qwen 3).

Sliding windows are off unless `use_sliding_window`; then the layers from `max_window_layers` on slide.
"""

from twofold.config import LayerType
from twofold.models.families.base import (
    ConfigReader,
    DonorConfig,
    DonorFamily,
    JsonDict,
    donor_map,
    read_donor,
)
from twofold.models.families.llama import PRE_NORMS, take_pre_norm_stack


def _read_config(config: JsonDict) -> DonorConfig:
    is_qwen3 = config["model_type"] == "qwen3"
    where = f"{config['model_type']} config"
    reader = ConfigReader(config, where)
    n_layers = reader.take("num_hidden_layers")
    slides = bool(reader.take("use_sliding_window", False))
    window = reader.take("sliding_window", None)
    first_sliding = reader.take("max_window_layers", 28)
    by_index: list[LayerType] = [
        "sliding_attention" if slides and i >= first_sliding else "full_attention" for i in range(n_layers)
    ]
    layer_types: list[LayerType] = reader.take("layer_types", by_index)
    has_bias = bool(reader.take("attention_bias", False)) if is_qwen3 else True
    reader.expect("use_mrope", False)
    stack = take_pre_norm_stack(
        reader,
        where,
        n_layers=n_layers,
        layer_types=layer_types,
        sliding_window=window if "sliding_attention" in layer_types else None,
        head_dim=128 if is_qwen3 else None,
        max_positions=32_768,
        qk_norm=is_qwen3,
        qkv_bias=has_bias,
        output_bias=has_bias and is_qwen3,
    )
    return read_donor(reader, stack, ties_by_default=False)


_PROJECTIONS = tuple(f"{name}_proj.weight" for name in "qkvo")
_BIASES = tuple(f"{name}_proj.bias" for name in "qkv")

QWEN2 = DonorFamily(("qwen2",), _read_config, donor_map(PRE_NORMS, attention_names=_PROJECTIONS + _BIASES))
QWEN3 = DonorFamily(
    ("qwen3",),
    _read_config,
    donor_map(
        PRE_NORMS,
        attention_names=(*_PROJECTIONS, *_BIASES, "o_proj.bias", "q_norm.weight", "k_norm.weight"),
    ),
)
