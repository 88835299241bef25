"""Attention weights against those of transformers, and against a plain loop over queries and keys."""

import math

import pytest
import torch

from tests.models.families import test_t5gemma
from tests.models.tiny import (
    MEETINGS,
    TOLERANCE,
    assert_same,
    build,
    gemma_stack,
    meeting_id,
    pair_config,
    random_ids,
)
from twofold.infer.attribution import attribute

SOURCE = random_ids(1, 9, seed=1)[0].tolist()
PREFIX = [2, 31, 32]
ANSWER = random_ids(1, 7, seed=2)[0].tolist()


@pytest.mark.parametrize("variant", ["balanced", "large-encoder", "no-caps"])
@torch.no_grad()
def test_separate_cross_attention_is_that_of_transformers(variant):
    """Grouped heads, with and without soft-caps; the row of an answer token is that of the position before it."""
    theirs = test_t5gemma.reference(variant)
    ours = test_t5gemma.ours_of(theirs)
    found = attribute(ours, SOURCE, PREFIX, ANSWER, keep="all")
    output = theirs(
        input_ids=torch.tensor([SOURCE]),
        decoder_input_ids=torch.tensor([[*PREFIX, *ANSWER[:-1]]]),
        output_attentions=True,
        use_cache=False,
    )
    expected = torch.stack([layer[0, :, len(PREFIX) - 1 :] for layer in output.cross_attentions])
    assert_same(found.weights, expected)
    assert expected.std() > 0.05  # not just uniform
    assert found.own.abs().max() == 0.0


def naive_weights(attention, q_NTH, k_KAH, visible):
    """Rows [N][T][A] as Python floats (float64), one query and key at a time."""
    group = attention.n_heads // attention.n_kv_heads
    rows = []
    for n, q_TH in enumerate(q_NTH):
        k_AH = k_KAH[n // group]
        rows.append([])
        for t, q in enumerate(q_TH):
            scores = []
            for a, k in enumerate(k_AH):
                score = attention.scale * sum(x * y for x, y in zip(q.tolist(), k.tolist(), strict=True))
                if attention.softcap is not None:
                    score = attention.softcap * math.tanh(score / attention.softcap)
                scores.append(math.exp(score) if visible(t, a) else 0.0)
            rows[-1].append([score / sum(scores) for score in scores])
    return rows


@torch.no_grad()
def naive_attribution(model, source, prefix, answer):
    """[L, N, T, S]. Layer inputs are the model's own; attention from there on is the plain loop."""
    config, n_source = model.config, len(source)
    ids = [*prefix, *answer[:-1]]
    output = model(torch.tensor([source]), None, torch.tensor([ids]), output_hidden_states=True)
    first = n_source if config.decoder_positions == "continue" else 0
    found = []
    for i, layer in enumerate(model.decoder.layers):
        layer_type = config.decoder.layer_types[i]
        window = config.decoder.sliding_window if layer_type == "sliding_attention" else 10_000
        rope = model.decoder.rope(first + torch.arange(len(ids))[None])[layer_type]
        source_rope = model.decoder.rope(torch.arange(n_source)[None])[layer_type]
        memory = output.encoder.memory[i if len(output.encoder.memory) > 1 else 0]
        x = output.decoder_hidden_states[i]
        read = layer.pre_self_attn_layernorm(x)
        own = layer.self_attn.keys_values(read, rope)
        seen = layer.read_source(memory, source_rope if config.cross_rope else None)
        q = layer.self_attn.queries(read, rope)[0]
        if config.layout == "merged":

            def visible(t, a):
                if a >= n_source:
                    return 0 <= t - (a - n_source) < window  # noqa: B023
                return not config.window_covers_source or first + t - a < window  # noqa: B023

            keys = torch.cat([seen.keys, own.keys], dim=2)[0]
            rows = naive_weights(layer.self_attn, q, keys, visible)
        else:
            rows = naive_weights(layer.self_attn, q, own.keys[0], lambda t, a: 0 <= t - a < window)  # noqa: B023
            values = own.values[0].repeat_interleave(q.shape[0] // own.values.shape[1], dim=0)
            attended = layer.self_attn.project((torch.tensor(rows) @ values)[None])
            x = x + layer.post_self_attn_layernorm(attended)
            q = layer.cross_attn.queries(
                layer.pre_cross_attn_layernorm(x), rope if config.cross_rope else None
            )
            rows = naive_weights(layer.cross_attn, q[0], seen.keys[0], lambda t, a: True)
        found.append(rows)
    return torch.tensor(found)[:, :, len(prefix) - 1 :, :n_source]


CHOSEN = [MEETINGS[i] for i in (0, 5, 7, 8, 11, 15, 16, 17)]


@pytest.mark.parametrize("meeting", CHOSEN, ids=meeting_id)
def test_every_layout_is_a_plain_loop(meeting, monkeypatch):
    """Merged and separate, windows over the source where the layout has them; taken in pieces of two rows."""
    monkeypatch.setattr("twofold.infer.attribution._WEIGHTS_AT_ONCE", 2 * 4 * 18)
    model = build(pair_config(gemma_stack(), **meeting), qk_factor=2.0)
    found = attribute(model, SOURCE, PREFIX, ANSWER, keep="all")
    assert found.weights.shape == (3, 4, len(ANSWER), len(SOURCE))
    assert found.weights.dtype == torch.float32
    assert_same(found.weights, naive_attribution(model, SOURCE, PREFIX, ANSWER))
    whole = found.weights.sum(dim=-1) + found.own
    assert_same(whole, torch.ones_like(whole))
    assert (found.own.max() > 0.1) == (meeting["layout"] == "merged")
    if model.config.window_covers_source:  # nothing of the source lies within three tokens of the answer
        assert found.weights[1].max() == 0.0


@pytest.fixture(scope="module")
def model():
    return build(pair_config(gemma_stack(), **MEETINGS[15]), qk_factor=2.0)


def test_averages_are_those_of_all_weights(model):
    every = attribute(model, SOURCE, PREFIX, ANSWER, keep="all")
    chosen = {"layers": [2, 0], "heads": [3, 1]}
    part = every.weights[[2, 0]][:, [3, 1]]
    own = every.own[[2, 0]][:, [3, 1]]
    axes = {"mean": (0, 1), "layers": (1,), "heads": (0,), "all": ()}
    for keep, axis in axes.items():
        found = attribute(model, SOURCE, PREFIX, ANSWER, keep=keep, **chosen)
        assert_same(found.weights, part.mean(axis, keepdim=True) if axis else part)
        assert_same(found.own, own.mean(axis, keepdim=True) if axis else own)
    assert_same(attribute(model, SOURCE, PREFIX, ANSWER).weights, every.weights.mean((0, 1), keepdim=True))


def test_bad_input(model):
    for arguments, options, match in [
        (([], PREFIX, ANSWER), {}, "a source and an answer, got 0 and 7 tokens"),
        ((SOURCE, PREFIX, []), {}, "got 9 and 0 tokens"),
        ((SOURCE, [], ANSWER), {}, "empty decoder prefix"),
        ((SOURCE, PREFIX, [99]), {}, "token ids from 99 to 99"),
        ((SOURCE, PREFIX, [5] * 60), {}, "max_position_embeddings of 64"),
        (
            (SOURCE, PREFIX, ANSWER),
            {"layers": [3]},
            r"layers must be different numbers from 0 to 2, .* got \[3\]",
        ),
        ((SOURCE, PREFIX, ANSWER), {"heads": [1, 1]}, "heads must be different numbers from 0 to 3"),
        ((SOURCE, PREFIX, ANSWER), {"keep": "some"}, "unknown keep='some'"),
    ]:
        with pytest.raises(ValueError, match=match):
            attribute(model, *arguments, **options)


@torch.no_grad()
def test_bfloat16_models_give_float32_weights(model):
    """Rounded queries and keys, but a softmax as good as float32's."""
    half = build(model.config, qk_factor=2.0).bfloat16()
    found = attribute(half, SOURCE, PREFIX, ANSWER, keep="all")
    assert found.weights.dtype == torch.float32
    whole = found.weights.sum(dim=-1) + found.own
    assert (whole - 1.0).abs().max() < TOLERANCE
