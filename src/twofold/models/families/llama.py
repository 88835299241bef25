"""Llama-like donors: Llama 2 and 3, SmolLM2, Mistral. Pre-norms only, `weight * x` norms, no q/k norm."""

from collections.abc import Sequence

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

PRE_NORMS = {
    "input_layernorm": "pre_self_attn_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",  # after attention, in front of the MLP
}


def take_pre_norm_stack(
    reader: ConfigReader,
    where: str,
    *,
    n_layers: int,
    layer_types: Sequence[LayerType],
    sliding_window: int | None,
    head_dim: int | None,
    max_positions: int,
    qk_norm: bool,
    qkv_bias: bool,
    output_bias: bool,
) -> StackConfig:
    """The block that Llama, Mistral and Qwen share.

    Args:
        head_dim: where the config has none; None: width over heads.
        max_positions: where the config has none.
    """
    width, n_heads = reader.take("hidden_size"), reader.take("num_attention_heads")
    head_dim = reader.take("head_dim", head_dim or width // n_heads)
    rope = take_single_rope(reader, where, 10_000.0)
    return StackConfig(
        vocab_size=reader.take("vocab_size"),
        hidden_size=width,
        intermediate_size=reader.take("intermediate_size"),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=reader.take("num_key_value_heads", n_heads),
        head_dim=head_dim,
        hidden_activation=reader.take("hidden_act", "silu"),
        rms_norm_eps=reader.take("rms_norm_eps", 1e-6),
        norm_adds_one=False,
        post_norms=False,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=bool(reader.take("mlp_bias", False)),
        scale_embeddings=False,
        rope=dict.fromkeys(layer_types, rope),
        layer_types=tuple(layer_types),
        sliding_window=sliding_window,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=reader.take("max_position_embeddings", max_positions),
        initializer_range=reader.take("initializer_range", 0.02),
        attention_dropout=reader.take("attention_dropout", 0.0),
    )


def _read_config(config: JsonDict) -> DonorConfig:
    is_mistral = config["model_type"] == "mistral"
    where = f"{config['model_type']} config"
    reader = ConfigReader(config, where)
    n_layers = reader.take("num_hidden_layers")
    # Mistral: every layer slides when a window is given. Llama has no such key.
    window = reader.take_nullable("sliding_window", 4096) if is_mistral else None
    layer_type: LayerType = "full_attention" if window is None else "sliding_attention"
    has_bias = bool(reader.take("attention_bias", False))
    reader.expect("rope_interleaved", False)
    reader.expect("layer_types", [layer_type] * n_layers)
    stack = take_pre_norm_stack(
        reader,
        where,
        n_layers=n_layers,
        layer_types=[layer_type] * n_layers,
        sliding_window=window,
        head_dim=None,
        max_positions=131_072 if is_mistral else 2048,
        qk_norm=False,
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    return read_donor(reader, stack, ties_by_default=False)


_ATTENTION = tuple(f"{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias"))

LLAMA = DonorFamily(("llama", "mistral"), _read_config, donor_map(PRE_NORMS, attention_names=_ATTENTION))
