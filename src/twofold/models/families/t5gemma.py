"""T5Gemma (arXiv 2504.06225): two Gemma 2 stacks, a cross-attention sub-layer reading the normed encoder output.

Layout and defaults: transformers, models/t5gemma. Tensor names are ours, so the map is the identity.
"""

from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.models.families.base import ConfigReader, JsonDict, PairFamily, TensorMap, write_rope
from twofold.models.families.gemma import take_gemma2_stack, write_stack
from twofold.models.families.pair import differences, layer_tensors, read_sides, write_outer, write_tokens


def _read_config(config: JsonDict) -> EncoderDecoderConfig:
    reader = ConfigReader(config, "t5gemma config")
    ties = bool(reader.take("tie_word_embeddings", True))
    sides = read_sides(
        reader.take("encoder"), reader.take("decoder"), reader, "t5gemma config", take_gemma2_stack
    )
    reader.finish()
    return EncoderDecoderConfig(
        layout="separate",
        reads="final",
        cross_rope=False,
        decoder_positions="restart",
        tie_word_embeddings="decoder" if ties else "none",
        decoder_start="bos",
        source_bos=False,  # the tokenizers' own add_bos_token=false; BOS goes to the decoder
        **sides,
    )


def _write_config(config: EncoderDecoderConfig) -> JsonDict:
    problems = differences_from_t5gemma(config)
    if problems:
        raise ValueError("not a T5Gemma model, cannot write its config: " + "; ".join(problems))

    def side(stack: StackConfig, is_decoder: bool) -> JsonDict:
        block = write_stack(stack) | write_tokens(config)
        block |= {
            "model_type": "t5_gemma_module",
            "rope_parameters": write_rope(next(iter(stack.rope.values()))),
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
        "encoder": side(config.encoder, is_decoder=False),
        "decoder": side(config.decoder, is_decoder=True),
        **write_outer(config),
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
    found = differences(config, wanted, {"qk_norm": False, "bidirectional_window": "each_side"})
    if config.tie_word_embeddings == "all":
        found.append("tie_word_embeddings is 'all'; its encoder table is separate")
    found += [
        f"{side}: layer types have different RoPE"
        for side, stack in (("encoder", config.encoder), ("decoder", config.decoder))
        if len({rope.model_dump_json() for rope in stack.rope.values()}) > 1
    ]
    return found


def _tensor_map() -> TensorMap:
    """Every name is ours already; listed so that an unknown one is an error."""
    shared = layer_tensors(qk_norm=False)
    cross = [name.replace("self", "cross") for name in shared if "self" in name]
    names = ["lm_head.out_proj.weight"]
    for side, layer in (("encoder", shared), ("decoder", shared + cross)):
        names += [f"model.{side}.embed_tokens.weight", f"model.{side}.norm.weight"]
        names += [f"model.{side}.layers.{{i}}.{name}" for name in layer]
    return TensorMap({name: name for name in names})


T5GEMMA = PairFamily("t5gemma", _read_config, _write_config, _tensor_map())
