"""CTranslate2 exports run by CTranslate2: scores, answers, quantised weights, and what it cannot do."""

import builtins
import json

import pytest
import torch

ctranslate2 = pytest.importorskip("ctranslate2")

from tests.models.tiny import build, gemma_stack, pair_config, stack  # noqa: E402
from twofold.config import RopeConfig  # noqa: E402
from twofold.export import export  # noqa: E402
from twofold.export.export import TOLERANCE  # noqa: E402
from twofold.infer import generate  # noqa: E402

FULL = {"layer_types": ("full_attention",) * 3}
NO_CAPS = {"attn_logit_softcapping": None, "qk_norm": False}
LLAMA3 = RopeConfig(
    theta=50.0, scaling="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
STACKS = {
    "llama": stack(**FULL),
    "biases-all-heads": stack(
        **FULL, qkv_bias=True, output_bias=True, mlp_bias=True, num_key_value_heads=4, query_pre_attn_scalar=3
    ),
    "gemma-final-cap": gemma_stack(**FULL, **NO_CAPS),
    "gelu-one-kv-head": stack(**FULL, hidden_activation="gelu", num_key_value_heads=1),
    "window-as-long-as-all": gemma_stack(**NO_CAPS, sliding_window=64),
    "rope-linear": stack(
        **FULL, rope={"full_attention": RopeConfig(theta=100.0, scaling="linear", factor=3.0)}
    ),
    "rope-llama3": stack(**FULL, rope={"full_attention": LLAMA3}),
}


@pytest.mark.parametrize("one", STACKS.values(), ids=STACKS)
def test_scores_agree(one, tmp_path):
    exported = export(build(pair_config(one)), tmp_path / "out", to="ctranslate2")
    assert exported.difference < TOLERANCE


@pytest.mark.parametrize("changes", [
    {"tie_word_embeddings": "all"}, {"tie_word_embeddings": "none"}, {"source_bos": True},
    {"decoder_start": "last_source_token", "bos_token_id": None}, {"decoder_start": "last_source_token"},
])  # fmt: skip
def test_conventions_and_ties(changes, tmp_path):
    assert (
        export(build(pair_config(stack(**FULL), **changes)), tmp_path / "out", to="ctranslate2").difference
        < TOLERANCE
    )


def test_unequal_sides(tmp_path):
    encoder = stack(
        **FULL | {"layer_types": ("full_attention",) * 2}, num_hidden_layers=2, hidden_size=48, head_dim=4
    )
    pair = build(pair_config(encoder, gemma_stack(**FULL, **NO_CAPS, scale_embeddings=False)))
    assert export(pair, tmp_path / "out", to="ctranslate2").difference < TOLERANCE


@pytest.mark.parametrize("source_bos", [False, True])
def test_it_answers_as_the_model_does(source_bos, tmp_path):
    pair = build(pair_config(stack(**FULL), source_bos=source_bos, eos_token_ids=(1, 5)))
    export(pair, tmp_path / "out", to="ctranslate2")
    source = [9, 4, 33, 12]
    expected = generate(
        pair, [[2, *source] if source_bos else source], [[2]], max_new_tokens=12, stop_token_ids=(1,)
    )
    translator = ctranslate2.Translator(str(tmp_path / "out"))
    (result,) = translator.translate_batch(
        [[f"<id {i}>" for i in source]],
        beam_size=1,
        min_decoding_length=0,
        max_decoding_length=12,
        return_end_token=True,
    )
    assert result.hypotheses[0] == [f"<id {i}>" for i in expected[0].token_ids]


def test_vocabulary(byte_tokenizer, tmp_path):
    config = pair_config(
        stack(**FULL, vocab_size=260), bos_token_id=256, eos_token_ids=(257,), pad_token_id=257
    )
    pair = build(config)
    pair.tokenizer = byte_tokenizer
    export(pair, tmp_path / "out", to="ctranslate2")
    tokens = json.loads((tmp_path / "out" / "shared_vocabulary.json").read_text())
    assert [tokens[i] for i in (64, 256, 257, 258, 259)] == [
        "a",
        "<|im_start|>",
        "<|im_end|>",
        "<id 258>",
        "<id 259>",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["decoder_start_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_quantised_weights_are_run_too(tmp_path):
    pair = build(pair_config(stack(**FULL)))
    plain = export(pair, tmp_path / "plain", to="ctranslate2")
    before = {name: parameter.clone() for name, parameter in pair.named_parameters()}
    small = export(pair, tmp_path / "small", to="ctranslate2", quantization="int8")
    assert all(torch.equal(parameter, before[name]) for name, parameter in pair.named_parameters())
    assert small.difference == plain.difference < TOLERANCE
    assert small.difference_rounded is not None
    assert 1e-4 < small.difference_rounded < 2
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("plain", "small")]
    assert sizes[1] < 0.4 * sizes[0]
    with pytest.raises(ValueError, match="int3 is not a valid quantization type"):
        export(pair, tmp_path / "other", to="ctranslate2", quantization="int3")
    assert not (tmp_path / "other").exists()


def test_a_wrong_weight_is_found(tmp_path, monkeypatch):
    from twofold.export import ctranslate2 as target

    real = target.specification

    def wrong(pair, tokens):
        spec = real(pair, tokens)
        spec.encoder.layer[1].ffn.linear_0.weight = spec.encoder.layer[1].ffn.linear_0.weight * 1.01
        return spec

    monkeypatch.setattr(target, "specification", wrong)
    with pytest.raises(ValueError, match="the ctranslate2 export differs"):
        export(build(pair_config(stack(**FULL))), tmp_path / "out", to="ctranslate2")
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    ({"layout": "merged"}, {}, "layout is 'merged', not 'separate'"),
    ({"reads": "aligned"}, {}, "reads is 'aligned', not 'final'"),
    ({"cross_rope": True}, {}, "cross_rope is True, not False"),
    ({"decoder_positions": "continue"}, {}, "decoder_positions is 'continue'"),
    ({"encoder_mask": ("sink",) * 3}, {}, "encoder_mask has"),
    ({"encoder_future_share": 0.5}, {}, "encoder_future_share is 0.5"),
    ({"eoi_token_id": 7}, {}, "an embedding of its own"),
    ({}, {"attn_logit_softcapping": 3.0}, "encoder: attention scores are capped at 3.0"),
    ({}, {"qk_norm": True}, "decoder: queries and keys are normed"),
    (
        {},
        {"layer_types": ("full_attention", "sliding_attention", "full_attention")},
        r"decoder: sliding layers with a window of 3 tokens, fewer than its max_position_embeddings \(64\)",
    ),
]


@pytest.mark.parametrize(("changes", "of_stack", "message"), REFUSED)
def test_what_would_be_inexact_is_refused(changes, of_stack, message, tmp_path):
    pair = build(pair_config(stack(**(FULL | of_stack)), **changes))
    with pytest.raises(ValueError, match="cannot run this model exactly: .*" + message):
        export(pair, tmp_path / "out", to="ctranslate2")
    assert list(tmp_path.iterdir()) == []


def test_sides_that_differ_where_there_is_one_for_both(tmp_path):
    pair = build(pair_config(stack(**FULL), stack(**FULL, rms_norm_eps=1e-3)))
    with pytest.raises(ValueError, match="rms_norm_eps differs"):
        export(pair, tmp_path / "out", to="ctranslate2")


def test_the_window_of_an_encoder_that_reaches_half_to_each_side(tmp_path):
    """126 in total reach 62 back and 63 ahead of 64 positions: one too few."""
    one = stack(bidirectional_window="total", sliding_window=126)
    with pytest.raises(ValueError, match="encoder: sliding layers with a window of 126 tokens"):
        export(build(pair_config(one)), tmp_path / "out", to="ctranslate2")
    one = stack(bidirectional_window="total", sliding_window=127)
    assert export(build(pair_config(one)), tmp_path / "out", to="ctranslate2").difference < TOLERANCE


def test_without_the_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name == "ctranslate2":
            raise ModuleNotFoundError("No module named 'ctranslate2'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'twofold\[ctranslate2\]'"):
        export(build(pair_config(stack(**FULL))), tmp_path / "out", to="ctranslate2")


def test_a_bfloat16_model(tmp_path):
    pair = build(pair_config(stack(**FULL))).to(torch.bfloat16)
    assert export(pair, tmp_path / "out", to="ctranslate2").difference < TOLERANCE
