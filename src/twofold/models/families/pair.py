"""What the config.json files of T5Gemma and T5Gemma 2 have in common."""

from collections.abc import Callable, Mapping
from typing import Any

from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.models.families.base import ConfigReader, JsonDict

TakeStack = Callable[[ConfigReader, str], StackConfig]


def read_sides(
    encoder_block: JsonDict,
    decoder_block: JsonDict,
    reader: ConfigReader,
    where: str,
    take_stack: TakeStack,
    *,
    encoder_name: str = "encoder",
) -> JsonDict:
    """Both stacks, and what the outer config says of both, as keyword arguments of `EncoderDecoderConfig`.

    The outer dropout rates override those of the blocks, and outer special tokens come before the decoder's, as in
    transformers.

    Args:
        reader: of the outer config.
        where: how messages name that.
        take_stack: the family's reader of one block.
        encoder_name: how messages name the encoder's block.
    """
    rates = {rate: reader.take(rate, 0.0) for rate in ("dropout_rate", "attention_dropout")}
    encoder, _ = _read_side(encoder_block | rates, f"{where}, {encoder_name}", take_stack)
    decoder, tokens = _read_side(decoder_block | rates, f"{where}, decoder", take_stack)
    reader.expect("vocab_size", decoder.vocab_size)
    reader.take("initializer_range", None)  # the decoder's, repeated
    return {
        "encoder": encoder,
        "decoder": decoder,
        "encoder_mask": ("bidirectional",) * encoder.num_hidden_layers,
        "pad_token_id": reader.take("pad_token_id", tokens["pad_token_id"]),
        "bos_token_id": reader.take("bos_token_id", tokens["bos_token_id"]),
        "eos_token_ids": reader.take_tokens("eos_token_id") or tokens["eos_token_ids"],
        "classifier_dropout_rate": reader.take("classifier_dropout_rate", 0.0),
    }


def _read_side(block: JsonDict, where: str, take_stack: TakeStack) -> tuple[StackConfig, JsonDict]:
    """One stack, and its special tokens."""
    reader = ConfigReader(block, where)
    stack = take_stack(reader, where)
    tokens = {
        "pad_token_id": reader.take("pad_token_id", 0),
        "bos_token_id": reader.take("bos_token_id", 2),
        "eos_token_ids": reader.take_tokens("eos_token_id") or (1,),
    }
    reader.take("tie_word_embeddings", None)  # the outer config decides
    reader.finish()
    return stack, tokens


def write_tokens(config: EncoderDecoderConfig) -> JsonDict:
    """Special tokens, as the outer config and both blocks state them."""
    eos = config.eos_token_ids
    return {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0],
    }


def write_outer(config: EncoderDecoderConfig) -> JsonDict:
    """The outer config without model type, blocks and what only one family has."""
    return {
        "is_encoder_decoder": True,
        "dropout_rate": config.decoder.dropout_rate,
        "attention_dropout": config.decoder.attention_dropout,
        "classifier_dropout_rate": config.classifier_dropout_rate,
        "tie_word_embeddings": config.tie_word_embeddings != "none",
        "vocab_size": config.decoder.vocab_size,
        "initializer_range": config.decoder.initializer_range,
        **write_tokens(config),
    }


def differences(
    config: EncoderDecoderConfig, wanted: Mapping[str, Any], wanted_of_stacks: Mapping[str, Any]
) -> list[str]:
    """Why a model cannot be written in a family's format, in words; empty where it can.

    Args:
        wanted: fields of the pair and the values they must have.
        wanted_of_stacks: the same for both stacks, beside what both families share.
    """
    found = _unequal(config, {"source_projections": "shared", **wanted})
    if set(config.encoder_mask) != {"bidirectional"}:
        found.append(f"encoder_mask has {sorted(set(config.encoder_mask))}, not only 'bidirectional'")
    if config.tie_stacks:
        found.append("tie_stacks: both sides share their weights")
    if config.encoder_future_weight != 1.0:
        found.append(f"encoder_future_weight is {config.encoder_future_weight}, not 1")
    if not config.eos_token_ids:
        found.append("eos_token_ids are empty")
    shared = {"norm_adds_one": True, "post_norms": True, "scale_embeddings": True, "mlp_bias": False}
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        problems = _unequal(stack, shared | dict(wanted_of_stacks))
        if stack.qkv_bias != stack.output_bias:
            problems.append("biases on q, k, v and on the output differ")
        if stack.hidden_size % stack.num_attention_heads:
            # transformers 5 checks this when it reads the file, though head_dim is independent of it
            problems.append(
                f"hidden_size {stack.hidden_size} is no multiple of {stack.num_attention_heads} heads"
            )
        found += [f"{side}: {problem}" for problem in problems]
    found += [
        f"{rate} differs between encoder and decoder; the file has one for both"
        for rate in ("dropout_rate", "attention_dropout")
        if getattr(config.encoder, rate) != getattr(config.decoder, rate)
    ]
    return found


def _unequal(config: EncoderDecoderConfig | StackConfig, wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {getattr(config, key)!r}, not {value!r}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]


def layer_tensors(*, qk_norm: bool) -> list[str]:
    """Names of a block's tensors, cross-attention left out."""
    names = [f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    if qk_norm:
        names += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    names += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    norms = ("pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward")
    return names + [f"{norm}_layernorm.weight" for norm in norms]
