"""Llama-like donors: Llama 2 and 3, SmolLM2, Mistral. Pre-norms only, `weight * x` norms, no q/k norm."""

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


def _read_config(config: JsonDict) -> DonorConfig:
    model_type = config["model_type"]
    reader = ConfigReader(config, f"{model_type} config")
    width, n_heads, n_layers = (
        reader.take(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    # Mistral: every layer slides when a window is given. Llama has no such key.
    window = reader.take_nullable("sliding_window", 4096) if model_type == "mistral" else None
    layer_type: LayerType = "full_attention" if window is None else "sliding_attention"
    attention_bias = bool(reader.take("attention_bias", False))
    reader.expect("rope_interleaved", False)
    reader.expect("layer_types", [layer_type] * n_layers)
    stack = StackConfig(
        vocab_size=reader.take("vocab_size"),
        hidden_size=width,
        intermediate_size=reader.take("intermediate_size"),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=reader.take("num_key_value_heads", n_heads),
        head_dim=(head_dim := reader.take("head_dim", width // n_heads)),
        hidden_activation=reader.take("hidden_act", "silu"),
        rms_norm_eps=reader.take("rms_norm_eps", 1e-6),
        norm_adds_one=False,
        post_norms=False,
        qk_norm=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(reader.take("mlp_bias", False)),
        scale_embeddings=False,
        rope={layer_type: take_single_rope(reader, f"{model_type} config", 10_000.0)},
        layer_types=(layer_type,) * n_layers,
        sliding_window=window,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=reader.take("max_position_embeddings", 2048),
        initializer_range=reader.take("initializer_range", 0.02),
        attention_dropout=reader.take("attention_dropout", 0.0),
    )
    return read_donor(reader, stack, ties_by_default=False)


_ATTENTION = tuple(f"{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias"))

LLAMA = DonorFamily(("llama", "mistral"), _read_config, donor_map(PRE_NORMS, attention_names=_ATTENTION))
