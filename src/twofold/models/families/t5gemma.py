"""T5Gemma (arXiv 2504.06225): two Gemma 2 stacks, a cross-attention sub-layer reading the normed encoder output.

Layout and defaults: transformers, models/t5gemma. Tensor names are ours, so the map is the identity.
"""

from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.models.families.base import ConfigReader, JsonDict, PairFamily, TensorMap, write_rope
from twofold.models.families.gemma import take_gemma2_stack, write_stack


def _read_config(config: JsonDict) -> EncoderDecoderConfig:
    reader = ConfigReader(config, "t5gemma config")
    dropout_rate = reader.take("dropout_rate", 0.0)
    attention_dropout = reader.take("attention_dropout", 0.0)
    ties = bool(reader.take("tie_word_embeddings", True))
    encoder, _ = _read_side(reader.take("encoder"), "encoder", dropout_rate, attention_dropout)
    decoder, tokens = _read_side(reader.take("decoder"), "decoder", dropout_rate, attention_dropout)
    read = EncoderDecoderConfig(
        encoder=encoder,
        decoder=decoder,
        layout="separate",
        reads="final",
        cross_rope=False,
        decoder_positions="restart",
        encoder_mask=("bidirectional",) * encoder.num_hidden_layers,
        tie_word_embeddings="decoder" if ties else "none",
        decoder_start="bos",
        source_bos=False,  # the tokenizers' own add_bos_token=false; BOS goes to the decoder
        pad_token_id=reader.take("pad_token_id", tokens["pad"]),
        bos_token_id=reader.take("bos_token_id", tokens["bos"]),
        eos_token_ids=reader.take_tokens("eos_token_id") or tokens["eos"],
        classifier_dropout_rate=reader.take("classifier_dropout_rate", 0.0),
    )
    reader.expect("vocab_size", decoder.vocab_size)
    reader.take("initializer_range", None)  # the decoder's, repeated
    reader.finish()
    return read


def _read_side(
    block: JsonDict, side: str, dropout_rate: float, attention_dropout: float
) -> tuple[StackConfig, JsonDict]:
    """One stack, and its special tokens. The outer dropout rates override those of the blocks, as in transformers."""
    where = f"t5gemma config, {side}"
    reader = ConfigReader(
        block | {"dropout_rate": dropout_rate, "attention_dropout": attention_dropout}, where
    )
    stack = take_gemma2_stack(reader, where)
    tokens = {
        "pad": reader.take("pad_token_id", 0),
        "bos": reader.take("bos_token_id", 2),
        "eos": reader.take_tokens("eos_token_id") or (1,),
    }
    reader.take("tie_word_embeddings", None)  # the outer config decides
    reader.finish()
    return stack, tokens


def _write_config(config: EncoderDecoderConfig) -> JsonDict:
    problems = differences_from_t5gemma(config)
    if problems:
        raise ValueError("not a T5Gemma model, cannot write its config: " + "; ".join(problems))
    tokens = {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids)
        if len(config.eos_token_ids) > 1
        else config.eos_token_ids[0],
    }

    def side(stack: StackConfig, is_decoder: bool) -> JsonDict:
        rope = next(iter(stack.rope.values()))
        block = write_stack(stack) | tokens
        block |= {
            "model_type": "t5_gemma_module",
            "rope_parameters": write_rope(rope),
            "is_decoder": is_decoder,
            "tie_word_embeddings": config.tie_word_embeddings != "none",
            "use_cache": True,
        }
        if is_decoder:
            block["cross_attention_hidden_size"] = config.encoder.hidden_size
        return block

    return {
        "model_type": "t5gemma",
        "architectures": ["T5GemmaForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder": side(config.encoder, is_decoder=False),
        "decoder": side(config.decoder, is_decoder=True),
        "dropout_rate": config.decoder.dropout_rate,
        "attention_dropout": config.decoder.attention_dropout,
        "classifier_dropout_rate": config.classifier_dropout_rate,
        "tie_word_embeddings": config.tie_word_embeddings != "none",
        "vocab_size": config.decoder.vocab_size,
        "initializer_range": config.decoder.initializer_range,
        **tokens,
    }


def differences_from_t5gemma(config: EncoderDecoderConfig) -> list[str]:
    """Why a model cannot be a T5Gemma file, in words; empty where it can."""
    wanted = {
        "layout": "separate",
        "reads": "final",
        "cross_rope": False,
        "decoder_positions": "restart",
        "decoder_start": "bos",
        "eoi_token_id": None,
    }
    found = [
        f"{key} is {getattr(config, key)!r}, not {value!r}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
    if set(config.encoder_mask) != {"bidirectional"}:
        found.append(f"encoder_mask has {sorted(set(config.encoder_mask))}, not only 'bidirectional'")
    if config.tie_word_embeddings == "all":
        found.append("tie_word_embeddings is 'all'; its encoder table is separate")
    if not config.eos_token_ids:
        found.append("eos_token_ids are empty")
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        found += [f"{side}: {problem}" for problem in _differences_from_gemma2(stack)]
    for rate in ("dropout_rate", "attention_dropout"):
        if getattr(config.encoder, rate) != getattr(config.decoder, rate):
            found.append(f"{rate} differs between encoder and decoder; the file has one for both")
    return found


def _differences_from_gemma2(stack: StackConfig) -> list[str]:
    found = []
    for flag, value in (
        ("norm_adds_one", True),
        ("post_norms", True),
        ("qk_norm", False),
        ("scale_embeddings", True),
        ("mlp_bias", False),
        ("bidirectional_window", "each_side"),
    ):
        if getattr(stack, flag) != value:
            found.append(f"{flag} is {getattr(stack, flag)!r}, not {value!r}")
    if stack.qkv_bias != stack.output_bias:
        found.append("biases on q, k, v and on the output differ")
    if len({rope.model_dump_json() for rope in stack.rope.values()}) > 1:
        found.append("layer types have different RoPE")
    if stack.hidden_size % stack.num_attention_heads:
        # transformers 5 checks this when it reads the file, though head_dim is independent of it
        found.append(f"hidden_size {stack.hidden_size} is no multiple of {stack.num_attention_heads} heads")
    return found


def _tensor_map() -> TensorMap:
    """Every name is ours already; listed so that an unknown one is an error."""
    norms = ["pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward"]
    shared = [f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    shared += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    shared += [f"{norm}_layernorm.weight" for norm in norms]
    cross = [name.replace("self", "cross") for name in shared if "self" in name]
    names = ["lm_head.out_proj.weight"]
    for side, layer in (("encoder", shared), ("decoder", shared + cross)):
        names += [f"model.{side}.embed_tokens.weight", f"model.{side}.norm.weight"]
        names += [f"model.{side}.layers.{{i}}.{name}" for name in layer]
    return TensorMap({name: name for name in names})


T5GEMMA = PairFamily("t5gemma", _read_config, _write_config, _tensor_map())
