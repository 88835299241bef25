"""Gemma 2 and Gemma 3 (text) donors, and the block that they share with T5Gemma and T5Gemma 2.

Sandwich norms with `1 + weight`, scaled embeddings, alternating local and global layers. Gemma 2 caps scores
and logits and alternates one to one, local first; Gemma 3 norms q and k, has a RoPE per layer type, and goes
five local layers to one global.
"""

from twofold.config import LayerType, RopeConfig, StackConfig
from twofold.models.families.base import (
    ConfigReader,
    DonorConfig,
    DonorFamily,
    JsonDict,
    donor_map,
    read_donor,
    read_rope,
    take_single_rope,
    write_rope,
)

_NORMS = {
    "input_layernorm": "pre_self_attn_layernorm",
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
}
_PROJECTIONS = tuple(f"{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias"))


def take_gemma2_stack(reader: ConfigReader, where: str) -> StackConfig:
    """A Gemma 2 block of config.json, also one side of T5Gemma. Defaults are those of transformers' classes."""
    n_layers = reader.take("num_hidden_layers", 26)
    layer_types = _take_layer_types(reader, n_layers, pattern=2)
    rope = take_single_rope(reader, where, 10_000.0)
    return _stack(
        reader,
        n_layers,
        layer_types,
        dict.fromkeys(layer_types, rope),
        qk_norm=False,
        vocab_size=256_000,
        max_positions=8192,
        caps=(50.0, 30.0),
    )


def take_gemma3_stack(reader: ConfigReader, where: str) -> StackConfig:
    """A Gemma 3 text block of config.json, also one side of T5Gemma 2.

    Two spellings of RoPE: `rope_parameters` with an entry per layer type; or `rope_theta` and `rope_scaling` for
    global layers and `rope_local_base_freq` for local ones.
    """
    n_layers = reader.take("num_hidden_layers", 26)
    pattern = reader.take("_sliding_window_pattern", 6)  # how transformers 5 keeps it, beside `layer_types`
    layer_types = _take_layer_types(reader, n_layers, pattern=reader.take("sliding_window_pattern", pattern))
    both = reader.take("rope_parameters", {})
    full = {"rope_theta": reader.take("rope_theta", 1_000_000.0)} | both.get("full_attention", {})
    full |= reader.take("rope_scaling", {})
    local = {"rope_theta": reader.take("rope_local_base_freq", 10_000.0)} | both.get("sliding_attention", {})
    rope: dict[LayerType, RopeConfig] = {
        "full_attention": read_rope(full, f"{where}, rope of full_attention"),
        "sliding_attention": read_rope(local, f"{where}, rope of sliding_attention"),
    }
    return _stack(
        reader,
        n_layers,
        layer_types,
        {layer_type: rope[layer_type] for layer_type in layer_types},
        qk_norm=True,
        vocab_size=262_208,
        max_positions=131_072,
        caps=(None, None),
    )


def _take_layer_types(reader: ConfigReader, n_layers: int, pattern: int) -> tuple[LayerType, ...]:
    """`layer_types`, or every `pattern`-th layer global and the others local."""
    by_index = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n_layers)]
    types: tuple[LayerType, ...] = tuple(reader.take("layer_types", by_index))
    return types


def _stack(
    reader: ConfigReader,
    n_layers: int,
    layer_types: tuple[LayerType, ...],
    rope: dict[LayerType, RopeConfig],
    *,
    qk_norm: bool,
    vocab_size: int,
    max_positions: int,
    caps: tuple[float | None, float | None],
) -> StackConfig:
    reader.expect("use_bidirectional_attention", False)
    reader.expect("hidden_act", "gelu_pytorch_tanh")
    attention_bias = bool(reader.take("attention_bias", False))
    attention_cap, final_cap = caps
    window = reader.take_nullable("sliding_window", 4096)
    reader.expect("sliding_window_size", window)  # some Gemma 2 files say it twice
    return StackConfig(
        vocab_size=reader.take("vocab_size", vocab_size),
        hidden_size=reader.take("hidden_size", 2304),
        intermediate_size=reader.take("intermediate_size", 9216),
        num_hidden_layers=n_layers,
        num_attention_heads=reader.take("num_attention_heads", 8),
        num_key_value_heads=reader.take("num_key_value_heads", 4),
        head_dim=reader.take("head_dim", 256),
        hidden_activation=reader.take("hidden_activation", "gelu_pytorch_tanh"),
        rms_norm_eps=reader.take("rms_norm_eps", 1e-6),
        norm_adds_one=True,
        post_norms=True,
        qk_norm=qk_norm,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        scale_embeddings=True,
        rope=rope,
        layer_types=layer_types,
        sliding_window=window,
        bidirectional_window="total" if qk_norm else "each_side",
        query_pre_attn_scalar=reader.take("query_pre_attn_scalar", 256),
        attn_logit_softcapping=reader.take_nullable("attn_logit_softcapping", attention_cap),
        final_logit_softcapping=reader.take_nullable("final_logit_softcapping", final_cap),
        max_position_embeddings=reader.take("max_position_embeddings", max_positions),
        initializer_range=reader.take("initializer_range", 0.02),
        dropout_rate=reader.take("dropout_rate", 0.0),
        attention_dropout=reader.take("attention_dropout", 0.0),
    )


def write_stack(stack: StackConfig) -> JsonDict:
    """The fields that Gemma 2 and Gemma 3 blocks have in common, in transformers' names; RoPE is the caller's."""
    same = """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        head_dim hidden_activation rms_norm_eps sliding_window query_pre_attn_scalar
        attn_logit_softcapping final_logit_softcapping max_position_embeddings initializer_range
        dropout_rate attention_dropout
    """.split()
    block: JsonDict = {key: getattr(stack, key) for key in same}
    scalar = stack.query_pre_attn_scalar
    block["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    block["attention_bias"] = stack.qkv_bias
    block["layer_types"] = list(stack.layer_types)
    return block


def write_gemma3_rope(stack: StackConfig) -> JsonDict:
    """`rope_parameters` with an entry per layer type."""
    return {layer_type: write_rope(rope) for layer_type, rope in stack.rope.items()}


def _read_gemma2(config: JsonDict) -> DonorConfig:
    reader = ConfigReader(config, "gemma2 config")
    return read_donor(reader, take_gemma2_stack(reader, "gemma2 config"), ties_by_default=True)


def _read_gemma3(config: JsonDict) -> DonorConfig:
    reader = ConfigReader(config, "gemma3_text config")
    return read_donor(reader, take_gemma3_stack(reader, "gemma3_text config"), ties_by_default=True)


GEMMA2 = DonorFamily(("gemma2",), _read_gemma2, donor_map(_NORMS, attention_names=_PROJECTIONS))
GEMMA3 = DonorFamily(
    ("gemma3_text",),
    _read_gemma3,
    donor_map(_NORMS, attention_names=(*_PROJECTIONS, "q_norm.weight", "k_norm.weight")),
)
