import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, T5GemmaConfig, T5GemmaForConditionalGeneration

from tests.models.hf import load_mapped
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

FAMILY = PAIRS["t5gemma"]
WINDOW = 5
SIDE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
    "max_position_embeddings": 64,
}
LARGE = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "attn_logit_softcapping": 2.0,
    "sliding_window": 4,
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "balanced": ({}, {}, {}),
    "large-encoder": (LARGE, {}, {}),
    "large-decoder-untied": ({}, LARGE | {"final_logit_softcapping": None}, {"tie_word_embeddings": False}),
    "biases": ({"attention_bias": True}, {"attention_bias": True, "num_key_value_heads": 4}, {}),
    "no-caps": ({"attn_logit_softcapping": None}, {"attn_logit_softcapping": None}, {}),
}


def reference(variant: str) -> T5GemmaForConditionalGeneration:
    """A random model of transformers. Scores exceed the caps."""
    encoder, decoder, outer = VARIANTS[variant]
    config = T5GemmaConfig(
        encoder=SIDE | encoder, decoder=SIDE | decoder, vocab_size=VOCAB, attn_implementation="eager", **outer
    )
    model = T5GemmaForConditionalGeneration(config).eval()
    randomise(model, seed=1, qk_factor=1.0 if variant == "no-caps" else 3.0)
    return model


def ours_of(model: T5GemmaForConditionalGeneration) -> EncoderDecoder:
    """Ours with their weights. Then their encoder's window is made one smaller.

    From transformers 5.4 on, eager attention lets an encoder token see `sliding_window` tokens to each side;
    the published rule, which ours follows, is one less.
    """
    ours = EncoderDecoder(FAMILY.read_config(model.config.to_dict())).eval()
    assert load_mapped(ours, model.state_dict(), FAMILY.tensor_map) == set()
    narrow(model)
    return ours


def narrow(model: T5GemmaForConditionalGeneration) -> None:
    model.config.encoder.sliding_window -= 1
    assert model.model.encoder.config.sliding_window == model.config.encoder.sliding_window


def compare(ours: EncoderDecoder, theirs: T5GemmaForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    """Logits and every hidden state, at real tokens."""
    with torch.no_grad():
        own = ours(**inputs, output_hidden_states=True)
        ref = theirs(**inputs, output_hidden_states=True, use_cache=False)
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
    """17 and 13 tokens: more than three windows, and more than two."""
    return {"input_ids": random_ids(2, 17, seed=2), "decoder_input_ids": random_ids(2, 13, seed=3)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_their_weights_in_ours_compute_the_same(variant: str) -> None:
    theirs = reference(variant)
    compare(ours_of(theirs), theirs, plain_inputs())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_both_sides(side: str) -> None:
    theirs = reference("large-encoder")
    source, source_mask = padded(random_ids(3, 17, seed=2), [17, 9, 3], side)
    target, target_mask = padded(random_ids(3, 13, seed=3), [4, 13, 8], side)
    inputs = {"input_ids": source, "attention_mask": source_mask}
    inputs |= {"decoder_input_ids": target, "decoder_attention_mask": target_mask}
    compare(ours_of(theirs), theirs, inputs)


def test_without_a_mask_pads_are_masked() -> None:
    theirs = reference("balanced")
    ours = ours_of(theirs)
    source, source_mask = padded(random_ids(2, 17, seed=2), [17, 9], "right")
    target, target_mask = padded(random_ids(2, 13, seed=3), [6, 13], "right")
    with torch.no_grad():
        without = ours(source, decoder_input_ids=target).logits
        given = ours(source, source_mask, target, target_mask).logits
        ones = torch.ones_like(source)
        unmasked = ours(source, ones, target, target_mask).logits
        # Theirs fills the decoder's mask from pads but leaves cross-attention open, so it is given that mask.
        ref = theirs(
            input_ids=source, attention_mask=source_mask, decoder_input_ids=target, use_cache=False
        ).logits
    assert torch.equal(without, given)
    assert_same(without[target_mask], ref[target_mask])
    assert differ(without[target_mask], unmasked[target_mask])


@torch.no_grad()
def test_cached_decoding_beyond_the_window() -> None:
    theirs = reference("large-encoder")
    ours = ours_of(theirs)
    source, source_mask = padded(random_ids(2, 17, seed=2), [17, 9], "left")
    # Seed 3 would be ill-conditioned: with it transformers is 6e-5 off its own float64 result on some processors.
    target = random_ids(2, 13, seed=4)
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
    assert cache.n_tokens == sum(pieces) == 13


@pytest.mark.parametrize("variant", ["balanced", "large-encoder", "large-decoder-untied"])
def test_their_folder_is_read(variant: str, tmp_path: Path) -> None:
    theirs = reference(variant)
    theirs.save_pretrained(tmp_path)
    ours = EncoderDecoder(FAMILY.read_config(json.loads((tmp_path / "config.json").read_text()))).eval()
    tensors = load_file(tmp_path / "model.safetensors")
    tied = set() if variant.endswith("untied") else {"lm_head.out_proj.weight"}
    assert load_mapped(ours, tensors, FAMILY.tensor_map) == tied
    n_encoder, n_decoder = theirs.config.encoder.num_hidden_layers, theirs.config.decoder.num_hidden_layers
    assert len(tensors) == (2 + 11 * n_encoder) + (2 + 17 * n_decoder) + (0 if tied else 1)
    narrow(theirs)
    compare(ours, theirs, plain_inputs())


@pytest.mark.parametrize("ties", ["decoder", "none"])
def test_our_weights_in_theirs_compute_the_same(ties: str) -> None:
    no_norm = {"qk_norm": False, "rope": {t: _rope() for t in ("full_attention", "sliding_attention")}}
    encoder = gemma_stack(
        **no_norm, hidden_size=48, num_attention_heads=6, sliding_window=4, qkv_bias=True, output_bias=True
    )
    decoder = gemma_stack(**no_norm, num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
    config = pair_config(encoder, decoder, tie_word_embeddings=ties, eos_token_ids=(1, 7))
    ours = build(config, seed=4, qk_factor=3.0)
    written = json.loads(json.dumps(FAMILY.write_config(config)))
    assert FAMILY.read_config(written) == config
    theirs = T5GemmaForConditionalGeneration(T5GemmaConfig(**written, attn_implementation="eager")).eval()
    state = {FAMILY.tensor_map.from_own(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    assert theirs.config.eos_token_id == [1, 7]
    narrow(theirs)
    compare(ours, theirs, plain_inputs())


def _rope() -> RopeConfig:
    return RopeConfig(theta=10_000.0)


def test_encoder_window_is_the_published_one() -> None:
    """Of one local layer: token 10 depends on tokens 6 to 14 with a window of 5, and on no other."""
    theirs = reference("balanced")
    ours = ours_of(theirs)
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = Tokens.from_segments(torch.ones(1, 20, dtype=torch.int64))
    config = ours.config.encoder
    assert config.layer_types[0] == "sliding_attention"
    mask = AttentionMask(tokens, (tokens, encoder_rule(config, "sliding_attention", "bidirectional")))
    out, _ = ours.encoder.layers[0](x, ours.encoder.rope(tokens.positions)["sliding_attention"], mask)
    (grad,) = torch.autograd.grad(out[0, 10].sum(), x)
    assert grad[0].abs().amax(-1).nonzero().flatten().tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("eos", [1, [1, 107], None])
def test_both_config_spellings(eos: Any) -> None:
    new = reference("balanced").config.to_dict()
    old = json.loads(json.dumps(new))
    for block in (old, old["encoder"], old["decoder"]):
        block["torch_dtype"] = "bfloat16"
        block.pop("dtype")
    for block in (old["encoder"], old["decoder"]):
        block["rope_theta"] = block.pop("rope_parameters")["rope_theta"]
        block.pop("layer_types")  # alternating, local first
        block["eos_token_id"] = eos if eos is not None else [1]
    old["eos_token_id"] = new["eos_token_id"] = eos
    read = FAMILY.read_config(old)
    assert read == FAMILY.read_config(new)
    assert read.eos_token_ids == ((1, 107) if isinstance(eos, list) else (1,))
    assert read.decoder.layer_types == ("sliding_attention", "full_attention") * 2


def test_published_defaults() -> None:
    read = FAMILY.read_config({"model_type": "t5gemma", "encoder": {}, "decoder": {}})
    side = read.decoder
    assert read.encoder == side
    assert (side.vocab_size, side.hidden_size, side.intermediate_size, side.num_hidden_layers) == (
        256_000,
        2304,
        9216,
        26,
    )
    assert (side.num_attention_heads, side.num_key_value_heads, side.head_dim) == (8, 4, 256)
    assert (side.attn_logit_softcapping, side.final_logit_softcapping, side.sliding_window) == (
        50.0,
        30.0,
        4096,
    )
    assert (side.query_pre_attn_scalar, side.rms_norm_eps, side.max_position_embeddings) == (256, 1e-6, 8192)
    assert side.rope["sliding_attention"].theta == side.rope["full_attention"].theta == 10_000.0
    assert side.bidirectional_window == "each_side"
    assert (read.pad_token_id, read.bos_token_id, read.eos_token_ids) == (0, 2, (1,))
    assert (read.layout, read.reads, read.cross_rope, read.decoder_positions) == (
        "separate",
        "final",
        False,
        "restart",
    )
    assert (read.tie_word_embeddings, read.source_bos, read.decoder_start) == ("decoder", False, "bos")
    # The same as transformers' own defaults.
    assert read == FAMILY.read_config(T5GemmaConfig().to_dict())


def test_null_cap_is_off_and_absent_cap_is_the_default() -> None:
    off = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    read = FAMILY.read_config({"model_type": "t5gemma", "encoder": off, "decoder": {}})
    assert (read.encoder.attn_logit_softcapping, read.encoder.final_logit_softcapping) == (None, None)
    assert (read.decoder.attn_logit_softcapping, read.decoder.final_logit_softcapping) == (50.0, 30.0)


def test_unknown_keys_are_listed() -> None:
    config = {"model_type": "t5gemma", "encoder": {}, "decoder": {"mystery": 1, "riddle": [2]}}
    with pytest.raises(ValueError, match=r"t5gemma config, decoder has keys .*mystery=1, riddle=\[2\]"):
        FAMILY.read_config(config)
    with pytest.raises(ValueError, match="mystery='x'"):
        FAMILY.read_config({"model_type": "t5gemma", "encoder": {}, "decoder": {}, "mystery": "x"})
    with pytest.raises(ValueError, match="no 'decoder'"):
        FAMILY.read_config({"model_type": "t5gemma", "encoder": {}})
    with pytest.raises(ValueError, match="vocab_size=5 is not supported; only 256000"):
        FAMILY.read_config({"model_type": "t5gemma", "encoder": {}, "decoder": {}, "vocab_size": 5})


def test_outer_dropout_rates_win() -> None:
    config = {
        "model_type": "t5gemma",
        "dropout_rate": 0.1,
        "attention_dropout": 0.2,
        "classifier_dropout_rate": 0.3,
    }
    read = FAMILY.read_config(config | {"encoder": {"dropout_rate": 0.5}, "decoder": {}})
    for side in (read.encoder, read.decoder):
        assert (side.dropout_rate, side.attention_dropout) == (0.1, 0.2)
    assert read.classifier_dropout_rate == 0.3


_GOOD = gemma_stack(qk_norm=False, rope={t: _rope() for t in ("full_attention", "sliding_attention")})


@pytest.mark.parametrize(
    ("changes", "sides", "reason"),
    [
        ({"layout": "merged"}, {}, "layout is 'merged', not 'separate'"),
        ({"reads": "aligned"}, {}, "reads is 'aligned', not 'final'"),
        ({"cross_rope": True}, {}, "cross_rope is True, not False"),
        ({"decoder_positions": "continue"}, {}, "decoder_positions is 'continue'"),
        ({"decoder_start": "last_source_token"}, {}, "decoder_start is 'last_source_token'"),
        ({"eoi_token_id": 9}, {}, "eoi_token_id is 9"),
        (
            {"encoder_mask": ("sink", "bidirectional", "causal")},
            {},
            r"encoder_mask has \['bidirectional', 'causal', 'sink'\]",
        ),
        ({"tie_word_embeddings": "all"}, {}, "its encoder table is separate"),
        ({"eos_token_ids": ()}, {}, "eos_token_ids are empty"),
        ({}, {"norm_adds_one": False}, "encoder: norm_adds_one is False, not True"),
        ({}, {"post_norms": False}, "post_norms is False"),
        ({}, {"qk_norm": True}, "qk_norm is True"),
        ({}, {"scale_embeddings": False}, "decoder: scale_embeddings is False"),
        ({}, {"mlp_bias": True}, "mlp_bias is True"),
        ({}, {"bidirectional_window": "total"}, "bidirectional_window is 'total'"),
        ({}, {"qkv_bias": True}, "biases on q, k, v and on the output differ"),
        ({}, {"num_attention_heads": 6}, "hidden_size 32 is no multiple of 6 heads"),
        ({}, {"rope": gemma_stack().rope}, "layer types have different RoPE"),
    ],
)
def test_what_is_no_t5gemma_is_not_written(
    changes: dict[str, Any], sides: dict[str, Any], reason: str
) -> None:
    FAMILY.write_config(pair_config(_GOOD))
    stack = _GOOD.model_copy(update=sides)
    with pytest.raises(ValueError, match=reason):
        FAMILY.write_config(pair_config(stack, **changes))


def test_dropout_must_agree_to_be_written() -> None:
    other = _GOOD.model_copy(update={"dropout_rate": 0.1})
    with pytest.raises(ValueError, match="dropout_rate differs between encoder and decoder"):
        FAMILY.write_config(pair_config(_GOOD, other))


def test_tensor_map_is_the_identity_and_complete() -> None:
    for variant in ("balanced", "large-decoder-untied", "biases"):
        for name in reference(variant).state_dict():
            assert FAMILY.tensor_map.to_own(name) == FAMILY.tensor_map.from_own(name) == name
    with pytest.raises(KeyError):
        FAMILY.tensor_map.to_own("model.encoder.layers.0.self_attn.q_norm.weight")
    assert not FAMILY.is_skippable("vision_tower.x")
