"""T5Gemma 2 (arXiv 2512.14856), text: two Gemma 3 stacks of equal width, merged attention, one embedding table.

Layout and defaults: transformers, models/t5gemma2. Files hold a vision tower and projector too; they are listed,
and skipped only when asked. A config we write has a small vision block that no tensor belongs to.
"""

from typing import Any

from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.models.families.base import ConfigReader, JsonDict, PairFamily, TensorMap
from twofold.models.families.gemma import take_gemma3_stack, write_gemma3_rope, write_stack

_VISION = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.encoder.vision_tower.",
    "model.encoder.multi_modal_projector.",
)

# transformers builds a vision tower in any case; without a block, one of 90M parameters.
_SMALL_VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 224,
    "patch_size": 14,
}


def _read_config(config: JsonDict) -> EncoderDecoderConfig:
    reader = ConfigReader(config, "t5gemma2 config")
    rates = {
        "dropout_rate": reader.take("dropout_rate", 0.0),
        "attention_dropout": reader.take("attention_dropout", 0.0),
    }
    outer = ConfigReader(reader.take("encoder"), "t5gemma2 config, encoder")
    encoder, _ = _read_side(outer.take("text_config") | rates, "encoder text_config")
    for key in (
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "image_token_index",
        "initializer_range",
    ):
        outer.take(key, None)  # of images only, or repeated
    outer.take("tie_word_embeddings", None)
    eoi_token_id = outer.take("eoi_token_index", 256_000)
    outer.finish()
    decoder, tokens = _read_side(reader.take("decoder") | rates, "decoder")
    reader.expect("eoi_token_index", eoi_token_id)
    reader.expect("tie_word_embeddings", True)
    reader.take("image_token_index", None)
    read = EncoderDecoderConfig(
        encoder=encoder,
        decoder=decoder,
        layout="merged",
        reads="final",
        cross_rope=False,
        decoder_positions="restart",
        encoder_mask=("bidirectional",) * encoder.num_hidden_layers,
        tie_word_embeddings="all",
        decoder_start="bos",
        source_bos=True,
        pad_token_id=reader.take("pad_token_id", tokens["pad"]),
        bos_token_id=reader.take("bos_token_id", tokens["bos"]),
        eos_token_ids=reader.take_tokens("eos_token_id") or tokens["eos"],
        eoi_token_id=eoi_token_id,
        classifier_dropout_rate=reader.take("classifier_dropout_rate", 0.0),
    )
    reader.expect("vocab_size", decoder.vocab_size)
    reader.take("initializer_range", None)
    reader.finish()
    return read


def _read_side(block: JsonDict, where: str) -> tuple[StackConfig, JsonDict]:
    reader = ConfigReader(block, f"t5gemma2 config, {where}")
    stack = take_gemma3_stack(reader, f"t5gemma2 config, {where}")
    tokens = {
        "pad": reader.take("pad_token_id", 0),
        "bos": reader.take("bos_token_id", 2),
        "eos": reader.take_tokens("eos_token_id") or (1,),
    }
    reader.take("tie_word_embeddings", None)
    reader.finish()
    return stack, tokens


def _write_config(config: EncoderDecoderConfig) -> JsonDict:
    problems = differences_from_t5gemma2(config)
    if problems:
        raise ValueError("not a T5Gemma 2 model, cannot write its config: " + "; ".join(problems))
    tokens: dict[str, Any] = {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids)
        if len(config.eos_token_ids) > 1
        else config.eos_token_ids[0],
    }

    def side(stack: StackConfig, model_type: str) -> JsonDict:
        rope = {"rope_parameters": write_gemma3_rope(stack)}
        return write_stack(stack) | rope | tokens | {"model_type": model_type, "tie_word_embeddings": True}

    return {
        "model_type": "t5gemma2",
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": side(config.encoder, "t5gemma2_text"),
            "vision_config": dict(_SMALL_VISION_CONFIG),
            "eoi_token_index": config.eoi_token_id,
            "tie_word_embeddings": True,
        },
        "decoder": side(config.decoder, "t5gemma2_decoder"),
        "eoi_token_index": config.eoi_token_id,
        "dropout_rate": config.decoder.dropout_rate,
        "attention_dropout": config.decoder.attention_dropout,
        "classifier_dropout_rate": config.classifier_dropout_rate,
        "tie_word_embeddings": True,
        "vocab_size": config.decoder.vocab_size,
        "initializer_range": config.decoder.initializer_range,
        **tokens,
    }


def differences_from_t5gemma2(config: EncoderDecoderConfig) -> list[str]:
    """Why a model cannot be a T5Gemma 2 file, in words; empty where it can."""
    wanted = {
        "layout": "merged",
        "reads": "final",
        "cross_rope": False,
        "decoder_positions": "restart",
        "decoder_start": "bos",
        "tie_word_embeddings": "all",
    }
    found = [
        f"{key} is {getattr(config, key)!r}, not {value!r}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
    if config.eoi_token_id is None:
        found.append("eoi_token_id is not set")
    if set(config.encoder_mask) != {"bidirectional"}:
        found.append(f"encoder_mask has {sorted(set(config.encoder_mask))}, not only 'bidirectional'")
    if not config.eos_token_ids:
        found.append("eos_token_ids are empty")
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        for flag, value in (
            ("norm_adds_one", True),
            ("post_norms", True),
            ("qk_norm", True),
            ("scale_embeddings", True),
            ("mlp_bias", False),
            ("bidirectional_window", "total"),
            # transformers reads this key, but its T5Gemma 2 attention does not apply the cap
            ("attn_logit_softcapping", None),
        ):
            if getattr(stack, flag) != value:
                found.append(f"{side}: {flag} is {getattr(stack, flag)!r}, not {value!r}")
        if stack.qkv_bias != stack.output_bias:
            found.append(f"{side}: biases on q, k, v and on the output differ")
        if stack.hidden_size % stack.num_attention_heads:
            found.append(
                f"{side}: hidden_size {stack.hidden_size} is no multiple of {stack.num_attention_heads} heads"
            )
    found += [
        f"{rate} differs between encoder and decoder; the file has one for both"
        for rate in ("dropout_rate", "attention_dropout")
        if getattr(config.encoder, rate) != getattr(config.decoder, rate)
    ]
    return found


def _tensor_map() -> TensorMap:
    norms = ["pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward"]
    layer = [f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    layer += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    layer += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    layer += [f"{norm}_layernorm.weight" for norm in norms]
    embedding = ["embed_tokens.weight", "embed_tokens.eoi_embedding"]
    names: dict[str, str | None] = {}
    for side in ("encoder", "decoder"):
        side_names = [*embedding, "norm.weight", *(f"layers.{{i}}.{name}" for name in layer)]
        names |= {f"model.{side}.{name}": f"model.{side}.{name}" for name in side_names}
    names["lm_head.out_proj.weight"] = "lm_head.out_proj.weight"
    # As transformers holds it in memory; on disk it drops `text_model`.
    names |= {f"model.encoder.text_model.{name}": f"model.encoder.{name}" for name in side_names}
    return TensorMap(names)


T5GEMMA2 = PairFamily(
    "t5gemma2", _read_config, _write_config, _tensor_map(), is_skippable=lambda name: name.startswith(_VISION)
)
