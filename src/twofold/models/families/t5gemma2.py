"""T5Gemma 2 (arXiv 2512.14856), text: two Gemma 3 stacks of equal width, merged attention, one embedding table.

Layout and defaults: transformers, models/t5gemma2. Files hold a vision tower and projector too; they are listed,
and skipped only when asked. A config we write has a small vision block that no tensor belongs to.
"""

from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.models.families.base import ConfigReader, JsonDict, PairFamily, TensorMap
from twofold.models.families.gemma import take_gemma3_stack, write_gemma3_rope, write_stack
from twofold.models.families.pair import differences, layer_tensors, read_sides, write_outer, write_tokens

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
    outer = ConfigReader(reader.take("encoder"), "t5gemma2 config, encoder")
    sides = read_sides(
        outer.take("text_config"),
        reader.take("decoder"),
        reader,
        "t5gemma2 config",
        take_gemma3_stack,
        encoder_name="encoder text_config",
    )
    for key in (
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "image_token_index",
        "initializer_range",
        "dropout_rate",
        "attention_dropout",
        "tie_word_embeddings",
    ):
        outer.take(key, None)  # of images only, or repeated from the outer config, which decides
    outer.expect("vocab_size", sides["encoder"].vocab_size)
    eoi_token_id = outer.take("eoi_token_index", 256_000)
    outer.finish()
    reader.expect("eoi_token_index", eoi_token_id)
    reader.expect("tie_word_embeddings", True)
    reader.take("image_token_index", None)
    reader.finish()
    return EncoderDecoderConfig(
        layout="merged",
        reads="final",
        cross_rope=False,
        decoder_positions="restart",
        tie_word_embeddings="all",
        decoder_start="bos",
        source_bos=True,
        eoi_token_id=eoi_token_id,
        **sides,
    )


def _write_config(config: EncoderDecoderConfig) -> JsonDict:
    problems = differences_from_t5gemma2(config)
    if problems:
        raise ValueError("not a T5Gemma 2 model, cannot write its config: " + "; ".join(problems))

    def side(stack: StackConfig, model_type: str) -> JsonDict:
        rope = {"rope_parameters": write_gemma3_rope(stack)}
        kind = {"model_type": model_type, "tie_word_embeddings": True}
        return write_stack(stack) | rope | write_tokens(config) | kind

    return {
        "model_type": "t5gemma2",
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": side(config.encoder, "t5gemma2_text"),
            "vision_config": dict(_SMALL_VISION_CONFIG),
            "eoi_token_index": config.eoi_token_id,
            "tie_word_embeddings": True,
        },
        "decoder": side(config.decoder, "t5gemma2_decoder"),
        "eoi_token_index": config.eoi_token_id,
        **write_outer(config),
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
    of_stacks = {
        "qk_norm": True,
        "bidirectional_window": "total",
        # transformers reads this key, but its T5Gemma 2 attention does not apply the cap
        "attn_logit_softcapping": None,
    }
    found = differences(config, wanted, of_stacks)
    if config.eoi_token_id is None:
        found.append("eoi_token_id is not set")
    return found


def _tensor_map() -> TensorMap:
    layer = [f"layers.{{i}}.{name}" for name in layer_tensors(qk_norm=True)]
    stack = ["embed_tokens.weight", "embed_tokens.eoi_embedding", "norm.weight", *layer]
    names: dict[str, str | None] = {"lm_head.out_proj.weight": "lm_head.out_proj.weight"}
    for side in ("encoder", "decoder"):
        names |= {f"model.{side}.{name}": f"model.{side}.{name}" for name in stack}
    # As transformers holds it in memory; on disk it drops `text_model`.
    names |= {f"model.encoder.text_model.{name}": f"model.encoder.{name}" for name in stack}
    return TensorMap(names)


T5GEMMA2 = PairFamily(
    "t5gemma2", _read_config, _write_config, _tensor_map(), is_skippable=lambda name: name.startswith(_VISION)
)
