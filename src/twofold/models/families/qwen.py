"""Qwen 2 and Qwen 3 donors: Llama's block, with biases on q, k, v (Qwen 2) or q/k norms (Qwen 3).

Sliding windows are off unless `use_sliding_window`; then the layers from `max_window_layers` on slide.
"""

from twofold.config import LayerType, StackConfig
from twofold.models.families.base import (
    ConfigReader,
    DonorConfig,
    DonorFamily,
    JsonDict,
    donor_map,
    read_donor,
    take_single_rope,
)
from twofold.models.families.llama import PRE_NORMS


def _read_config(config: JsonDict) -> DonorConfig:
    model_type = config["model_type"]
    is_qwen3 = model_type == "qwen3"
    reader = ConfigReader(config, f"{model_type} config")
    width, n_heads, n_layers = (
        reader.take(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    slides = bool(reader.take("use_sliding_window", False))
    window = reader.take("sliding_window", None)
    first_sliding = reader.take("max_window_layers", 28)
    by_index: list[LayerType] = [
        "sliding_attention" if slides and i >= first_sliding else "full_attention" for i in range(n_layers)
    ]
    layer_types: list[LayerType] = reader.take("layer_types", by_index)
    rope = take_single_rope(reader, f"{model_type} config", 10_000.0)
    attention_bias = bool(reader.take("attention_bias", False)) if is_qwen3 else True
    reader.expect("use_mrope", False)
    stack = StackConfig(
        vocab_size=reader.take("vocab_size"),
        hidden_size=width,
        intermediate_size=reader.take("intermediate_size"),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=reader.take("num_key_value_heads", n_heads),
        head_dim=(head_dim := reader.take("head_dim", 128 if is_qwen3 else width // n_heads)),
        hidden_activation=reader.take("hidden_act", "silu"),
        rms_norm_eps=reader.take("rms_norm_eps", 1e-6),
        norm_adds_one=False,
        post_norms=False,
        qk_norm=is_qwen3,
        qkv_bias=attention_bias,
        output_bias=attention_bias and is_qwen3,
        scale_embeddings=False,
        rope=dict.fromkeys(layer_types, rope),
        layer_types=tuple(layer_types),
        sliding_window=window if "sliding_attention" in layer_types else None,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=reader.take("max_position_embeddings", 32_768),
        initializer_range=reader.take("initializer_range", 0.02),
        attention_dropout=reader.take("attention_dropout", 0.0),
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
