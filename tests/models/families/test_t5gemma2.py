import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, T5Gemma2Config, T5Gemma2ForConditionalGeneration

from tests.models.hf import VISION, load_mapped
from tests.models.tiny import (
    VOCAB,
    assert_same,
    build,
    differ,
    gemma_stack,
    padded,
    pair_config,
    random_ids,
    randomise,
)
from twofold.config import RopeConfig
from twofold.models import DecoderCache, EncoderDecoder
from twofold.models.families import PAIRS
from twofold.models.masks import AttentionMask, Tokens, encoder_rule

FAMILY = PAIRS["t5gemma2"]
EOI = 7
SIDE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
    },
}


def reference(window: int = 5, **changes: Any) -> T5Gemma2ForConditionalGeneration:
    """A random model of transformers, with a vision tower that costs nothing."""
    side = SIDE | {"sliding_window": window} | changes
    encoder = {"text_config": dict(side), "vision_config": VISION, "eoi_token_index": EOI}
    config = T5Gemma2Config(encoder=encoder, decoder=dict(side), attn_implementation="eager")
    model = T5Gemma2ForConditionalGeneration(config).eval()
    randomise(model, seed=1, qk_factor=3.0)
    return model


def text_state(model: T5Gemma2ForConditionalGeneration) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not FAMILY.is_skippable(name)}


def ours_of(model: T5Gemma2ForConditionalGeneration) -> EncoderDecoder:
    ours = EncoderDecoder(FAMILY.read_config(model.config.to_dict())).eval()
    assert load_mapped(ours, text_state(model), FAMILY.tensor_map) == set()
    return ours


def compare(
    ours: EncoderDecoder,
    theirs: T5Gemma2ForConditionalGeneration,
    inputs: dict[str, Tensor],
    **theirs_only: Tensor,
) -> None:
    """Logits and every hidden state, at real tokens."""
    with torch.no_grad():
        own = ours(**inputs, output_hidden_states=True)
        ref = theirs(**inputs, **theirs_only, output_hidden_states=True, use_cache=False)
    source = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    target = inputs.get("decoder_attention_mask", torch.ones_like(inputs["decoder_input_ids"])).bool()
    assert_same(own.logits[target], ref.logits[target])
    sides = (
        (own.encoder.hidden_states, ref.encoder_hidden_states, source),
        (own.decoder_hidden_states, ref.decoder_hidden_states, target),
    )
    for own_states, ref_states, is_real in sides:
        assert len(own_states) == len(ref_states)
        for a, b in zip(own_states, ref_states, strict=True):
            assert_same(a[is_real], b[is_real])


def plain_inputs() -> dict[str, Tensor]:
    """17 and 13 tokens, with end-of-image tokens on both sides."""
    source, target = random_ids(2, 17, seed=2), random_ids(2, 13, seed=3)
    source[0, 4] = source[1, 0] = target[0, 3] = EOI
    return {"input_ids": source, "decoder_input_ids": target}


@pytest.mark.parametrize("window", [4, 5, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"final_logit_softcapping": 4.0, "num_key_value_heads": 1},
        {"attention_bias": True, "num_key_value_heads": 4},
    ],
    ids=["plain", "final-cap", "biases"],
)
def test_their_weights_in_ours_compute_the_same(window: int, changes: dict[str, Any]) -> None:
    theirs = reference(window, **changes)
    compare(ours_of(theirs), theirs, plain_inputs())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_both_sides(side: str) -> None:
    theirs = reference()
    source, source_mask = padded(random_ids(3, 17, seed=2), [17, 9, 3], side)
    target, target_mask = padded(random_ids(3, 13, seed=3), [4, 13, 8], side)
    inputs = {"input_ids": source, "attention_mask": source_mask}
    inputs |= {"decoder_input_ids": target, "decoder_attention_mask": target_mask}
    # Encoder keys are not rotated but the queries that meet them are, so positions are not only relative.
    # Theirs counts padding on the left unless told otherwise; ours does not.
    positions = (target_mask.long().cumsum(1) - 1).clamp(min=0)
    compare(ours_of(theirs), theirs, inputs, decoder_position_ids=positions)


@torch.no_grad()
def test_end_of_image_embedding_is_used_on_both_sides() -> None:
    ours = ours_of(reference())
    inputs = plain_inputs()
    before = ours(**inputs, output_hidden_states=True)
    vector = ours.encoder.embed_tokens.eoi_embedding
    assert ours.decoder.embed_tokens.eoi_embedding is vector
    assert torch.equal(before.encoder.hidden_states[0][0, 4], vector)
    assert torch.equal(before.decoder_hidden_states[0][0, 3], vector)
    ours.encoder.embed_tokens.weight[EOI] += 1.0
    after = ours(**inputs, output_hidden_states=True)
    assert torch.equal(after.encoder.hidden_states[0], before.encoder.hidden_states[0])


@torch.no_grad()
def test_cached_decoding_beyond_the_window() -> None:
    theirs = reference(window=4)
    ours = ours_of(theirs)
    source, source_mask = padded(random_ids(2, 17, seed=2), [17, 9], "left")
    target = random_ids(2, 13, seed=3)
    whole = ours(source, source_mask, target).logits
    encoded = ours.encode(source, source_mask)
    cache = DecoderCache()
    their_cache = EncoderDecoderCache(DynamicCache(config=theirs.config.decoder), DynamicCache())
    their_encoded = theirs.model.encoder(input_ids=source, attention_mask=source_mask)
    pieces = [4, 1, 1, 2, 1, 1, 1, 1, 1]
    for start, length in zip(torch.tensor([0, *pieces]).cumsum(0).tolist(), pieces, strict=False):
        piece = target[:, start : start + length]
        own = ours(decoder_input_ids=piece, encoder_output=encoded, cache=cache).logits
        ref = theirs(
            encoder_outputs=their_encoded,
            attention_mask=source_mask,
            decoder_input_ids=piece,
            past_key_values=their_cache,
            use_cache=True,
        ).logits
        assert_same(own, whole[:, start : start + length])
        assert_same(own, ref)


def test_tables_are_one() -> None:
    ours = ours_of(reference())
    table = ours.encoder.embed_tokens.weight
    assert ours.decoder.embed_tokens.weight is table
    assert ours.lm_head.out_proj.weight is table


def test_their_folder_is_read(tmp_path: Path) -> None:
    """On disk the encoder's names lack `text_model`; all but vision tensors map to parameters of ours."""
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    skipped = {name for name in tensors if FAMILY.is_skippable(name)}
    text = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    assert (
        len(text) == 4 + 2 * 13 * 4
    )  # table, eoi_embedding, two final norms; 13 tensors in each of 8 layers
    n_vision = sum(
        1 for name in theirs.state_dict() if "vision_tower" in name or "multi_modal_projector" in name
    )
    assert len(skipped) == n_vision > 0
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in skipped)
    assert all(FAMILY.tensor_map.from_own(FAMILY.tensor_map.to_own(name)) == name for name in text)
    ours = EncoderDecoder(FAMILY.read_config(json.loads((tmp_path / "config.json").read_text()))).eval()
    missing = load_mapped(ours, text, FAMILY.tensor_map)
    assert missing == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_tokens.eoi_embedding",
        "lm_head.out_proj.weight",
    }
    compare(ours, theirs, plain_inputs())
    with pytest.raises(KeyError):
        FAMILY.tensor_map.to_own(sorted(skipped)[0])


def _gemma3_like(window: int = 5) -> Any:
    rope = {
        "full_attention": RopeConfig(theta=500.0, scaling="linear", factor=8.0),
        "sliding_attention": RopeConfig(theta=50.0),
    }
    return gemma_stack(
        rope=rope, sliding_window=window, bidirectional_window="total", attn_logit_softcapping=None
    )


def _own_config(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "layout": "merged",
        "tie_word_embeddings": "all",
        "eoi_token_id": EOI,
        "source_bos": True,
    }
    return pair_config(
        changes.pop("encoder", _gemma3_like()), changes.pop("decoder", None), **(settings | changes)
    )


def test_our_weights_in_theirs_compute_the_same() -> None:
    config = _own_config()
    ours = build(config, seed=4)
    written = json.loads(json.dumps(FAMILY.write_config(config)))
    assert FAMILY.read_config(written) == config
    theirs = T5Gemma2ForConditionalGeneration(T5Gemma2Config(**written, attn_implementation="eager")).eval()
    theirs_names = set(text_state(theirs))
    in_memory = {}
    for name, tensor in ours.state_dict().items():
        on_disk = FAMILY.tensor_map.from_own(name)
        in_memory[on_disk.replace("model.encoder.", "model.encoder.text_model.")] = tensor
    assert set(in_memory) == theirs_names
    found = theirs.load_state_dict(in_memory, strict=False)
    assert not found.unexpected_keys
    assert all(FAMILY.is_skippable(name) for name in found.missing_keys)
    compare(ours, theirs, plain_inputs())


def test_our_folder_is_loaded_by_transformers(tmp_path: Path) -> None:
    config = _own_config()
    ours = build(config, seed=4)
    (tmp_path / "config.json").write_text(json.dumps(FAMILY.write_config(config)))
    tied = ("lm_head.", "model.decoder.embed_tokens.")
    tensors = {
        FAMILY.tensor_map.from_own(n): t for n, t in ours.state_dict().items() if not n.startswith(tied)
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = T5Gemma2ForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    # No tensor belongs to the vision tower; it must be small, not transformers' default of 90M parameters.
    assert sum(p.numel() for p in theirs.model.encoder.vision_tower.parameters()) < 100_000
    compare(ours, theirs.eval(), plain_inputs())


@pytest.mark.parametrize(
    ("window", "visible"),
    [(5, [8, 9, 10, 11, 12]), (4, [9, 10, 11, 12]), (1, [10]), (2, [10, 11])],
)
def test_encoder_window_is_the_total_width(window: int, visible: list[int]) -> None:
    """Rule V7: (W + 1) // 2 keys to the left with the query itself, W // 2 to the right."""
    ours = ours_of(reference(window))
    tokens = Tokens.from_segments(torch.ones(1, 20, dtype=torch.int64))
    mask = AttentionMask(
        tokens, (tokens, encoder_rule(ours.config.encoder, "sliding_attention", "bidirectional"))
    )
    assert mask.dense[0, 10].nonzero().flatten().tolist() == visible


@torch.no_grad()
def test_local_decoder_layers_see_the_whole_source() -> None:
    """Rule V4, seen from outside: with all layers local, the first source token moves the last logits."""
    theirs = reference(3, layer_types=["sliding_attention"] * 4)
    ours = ours_of(theirs)
    inputs = plain_inputs()
    encoded = ours.encode(inputs["input_ids"])
    changed = ours.encode(inputs["input_ids"])
    changed.memory[0][:, 0] += 1.0
    target = inputs["decoder_input_ids"]
    assert differ(
        ours(decoder_input_ids=target, encoder_output=encoded).logits[:, -1],
        ours(decoder_input_ids=target, encoder_output=changed).logits[:, -1],
    )
    compare(ours, theirs, inputs)


def _old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    old: dict[str, Any] = json.loads(json.dumps(config))
    for block in (old["encoder"]["text_config"], old["decoder"]):
        rope = block.pop("rope_parameters")
        full = rope["full_attention"]
        block["rope_theta"] = full.pop("rope_theta")
        block["rope_scaling"] = full
        block["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        block["sliding_window_pattern"] = 3
        block.pop("layer_types")
        block["torch_dtype"] = "bfloat16"
        block["eos_token_id"] = [1]
    return old


def test_both_config_spellings() -> None:
    pattern = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    new = reference(layer_types=pattern).config.to_dict()
    read = FAMILY.read_config(new)
    assert FAMILY.read_config(_old_spelling(new)) == read
    assert read.decoder.layer_types == tuple(pattern)
    assert read.decoder.rope["full_attention"] == RopeConfig(theta=500.0, scaling="linear", factor=8.0)
    assert read.decoder.rope["sliding_attention"] == RopeConfig(theta=50.0)


def test_published_defaults() -> None:
    read = FAMILY.read_config({"model_type": "t5gemma2", "encoder": {"text_config": {}}, "decoder": {}})
    side = read.decoder
    assert read.encoder == side
    assert (
        side.layer_types
        == (("sliding_attention",) * 5 + ("full_attention",)) * 4 + ("sliding_attention",) * 2
    )
    assert (side.vocab_size, side.sliding_window, side.max_position_embeddings) == (262_208, 4096, 131_072)
    assert (side.attn_logit_softcapping, side.final_logit_softcapping) == (None, None)
    assert (side.rope["sliding_attention"].theta, side.rope["full_attention"].theta) == (1e4, 1e6)
    assert (side.bidirectional_window, side.qk_norm) == ("total", True)
    assert (read.layout, read.reads, read.cross_rope, read.decoder_positions) == (
        "merged",
        "final",
        False,
        "restart",
    )
    assert (read.tie_word_embeddings, read.source_bos, read.eoi_token_id) == ("all", True, 256_000)
    assert read == FAMILY.read_config(T5Gemma2Config().to_dict())


def test_the_released_270m_config_is_read() -> None:
    """Keys and values of google/t5gemma-2-270m-270m's config.json, long lists of defaults left out."""
    block = {
        "_sliding_window_pattern": 6, "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "dropout_rate": 0.0, "dtype": "bfloat16", "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "initializer_range": 0.02,
        "intermediate_size": 2048, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "sliding_window": 512,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
        },
        "use_bidirectional_attention": False, "use_cache": True, "vocab_size": 262144,
    }  # fmt: skip
    text = block | {
        "model_type": "t5gemma2_text", "_name_or_path": "", "add_cross_attention": False, "architectures": None,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None, "decoder_start_token_id": None, "finetuning_task": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "is_decoder": False,
        "is_encoder_decoder": False, "output_attentions": False, "output_hidden_states": False, "prefix": None,
        "problem_type": None, "return_dict": True, "sep_token_id": None, "task_specific_params": None,
        "tie_word_embeddings": True, "tokenizer_class": None,
    }  # fmt: skip
    config = {
        "architectures": ["T5Gemma2ForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 2,
        "classifier_dropout_rate": 0.0, "dropout_rate": 0.0, "dtype": "bfloat16", "eoi_token_index": 256000,
        "eos_token_id": 1, "image_token_index": 256001, "initializer_range": 0.02, "is_encoder_decoder": True,
        "model_type": "t5gemma2", "pad_token_id": 0, "transformers_version": "5.0.0.dev0", "vocab_size": 262144,
        "decoder": block | {"model_type": "t5gemma2_decoder"},
        "encoder": {
            "attention_dropout": 0.0, "boi_token_index": 255999, "dropout_rate": 0.0, "dtype": "bfloat16",
            "eoi_token_index": 256000, "image_token_index": 256001, "initializer_range": 0.02,
            "mm_tokens_per_image": 256, "model_type": "t5gemma2_encoder", "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model"}, "vocab_size": 262144,
        },
    }  # fmt: skip
    read = FAMILY.read_config(config)
    assert read.encoder == read.decoder
    assert read.decoder.rope["full_attention"].factor == 8.0
    assert (read.decoder.vocab_size, read.decoder.sliding_window, read.eoi_token_id) == (262144, 512, 256000)


def test_unknown_keys_and_other_meanings_are_refused() -> None:
    base: dict[str, Any] = {"model_type": "t5gemma2", "encoder": {"text_config": {}}, "decoder": {}}
    with pytest.raises(ValueError, match=r"t5gemma2 config, decoder has keys .*mystery=1"):
        FAMILY.read_config(base | {"decoder": {"mystery": 1}})
    with pytest.raises(ValueError, match=r"t5gemma2 config, encoder has keys .*mystery=1"):
        FAMILY.read_config(base | {"encoder": {"text_config": {}, "mystery": 1}})
    with pytest.raises(ValueError, match=r"encoder text_config has keys .*mystery=1"):
        FAMILY.read_config(base | {"encoder": {"text_config": {"mystery": 1}}})
    with pytest.raises(ValueError, match=r"t5gemma2 config has keys .*mystery=1"):
        FAMILY.read_config(base | {"mystery": 1})
    with pytest.raises(ValueError, match="eoi_token_index=5 is not supported; only 256000"):
        FAMILY.read_config(base | {"eoi_token_index": 5})
    with pytest.raises(ValueError, match="tie_word_embeddings=False is not supported"):
        FAMILY.read_config(base | {"tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("changes", "sides", "reason"),
    [
        ({"layout": "separate"}, {}, "layout is 'separate', not 'merged'"),
        ({"reads": "aligned"}, {}, "reads is 'aligned', not 'final'"),
        ({"cross_rope": True}, {}, "cross_rope is True, not False"),
        ({"decoder_positions": "continue"}, {}, "decoder_positions is 'continue'"),
        ({"decoder_start": "last_source_token"}, {}, "decoder_start is 'last_source_token'"),
        ({"eoi_token_id": None}, {}, "eoi_token_id is not set"),
        ({"encoder_mask": ("causal",) * 3}, {}, r"encoder_mask has \['causal'\]"),
        ({"tie_word_embeddings": "decoder"}, {}, "tie_word_embeddings is 'decoder', not 'all'"),
        ({"eos_token_ids": ()}, {}, "eos_token_ids are empty"),
        ({}, {"qk_norm": False}, "encoder: qk_norm is False, not True"),
        ({}, {"mlp_bias": True}, "decoder: mlp_bias is True"),
        ({}, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, not None"),
        ({}, {"bidirectional_window": "each_side"}, "bidirectional_window is 'each_side'"),
        ({}, {"num_attention_heads": 6}, "hidden_size 32 is no multiple of 6 heads"),
        ({}, {"output_bias": True}, "biases on q, k, v and on the output differ"),
    ],
)
def test_what_is_no_t5gemma2_is_not_written(
    changes: dict[str, Any], sides: dict[str, Any], reason: str
) -> None:
    FAMILY.write_config(_own_config())
    stack = _gemma3_like().model_copy(update=sides)
    with pytest.raises(ValueError, match=reason):
        FAMILY.write_config(_own_config(encoder=stack, decoder=stack, **changes))


def test_dropout_must_agree_to_be_written() -> None:
    other = _gemma3_like().model_copy(update={"attention_dropout": 0.1})
    with pytest.raises(ValueError, match="attention_dropout differs between encoder and decoder"):
        FAMILY.write_config(_own_config(encoder=_gemma3_like(), decoder=other))
