"""The plain generator against a loop that has no cache and no batch."""

import pytest
import torch

from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config, stack
from twofold.infer import Sampling, generate

SOURCES = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
PREFIXES = [[2], [2, 20, 21], [22, 23]]


@torch.no_grad()
def naive_greedy(model, source, prefix, n_new, stop=()):
    """The whole decoder input again for every token, one row at a time."""
    ids = list(prefix)
    for _ in range(n_new):
        source_ids = torch.tensor([source], dtype=torch.int64)
        logits = model(source_ids, None, torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prefix) :]


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_greedy_equals_the_naive_loop(meeting):
    """Unequal rows in one batch, outputs beyond the window of 3, soft-caps."""
    model = build(
        pair_config(gemma_stack(), encoder_mask=("sink", "bidirectional", "causal"), **meeting), qk_factor=2.0
    )
    found = generate(model, SOURCES, PREFIXES, max_new_tokens=8, stop_token_ids=[])
    for result, source, prefix in zip(found, SOURCES, PREFIXES, strict=True):
        assert list(result.token_ids) == naive_greedy(model, source, prefix, 8)
        assert result.finish_reason == "length"


def test_padding_is_told_by_the_mask_not_by_an_id():
    """SmolLM2 pads with its end token, which is also a real one: no id can say what is padding."""
    model = build(pair_config(stack(), pad_token_id=1))
    found = generate(model, SOURCES, PREFIXES, max_new_tokens=8, stop_token_ids=[])
    for result, source, prefix in zip(found, SOURCES, PREFIXES, strict=True):
        assert list(result.token_ids) == naive_greedy(model, source, prefix, 8)


def test_rows_stop_on_their_own():
    model = build(pair_config(stack()))
    free = generate(model, SOURCES, PREFIXES, max_new_tokens=8, stop_token_ids=[])
    stop = free[0].token_ids[3]
    found = generate(model, SOURCES, PREFIXES, max_new_tokens=8, stop_token_ids=[stop])
    for result, source, prefix in zip(found, SOURCES, PREFIXES, strict=True):
        expected = naive_greedy(model, source, prefix, 8, stop=(stop,))
        assert list(result.token_ids) == expected
        assert result.finish_reason == ("stop" if expected[-1] == stop else "length")
    assert found[0].finish_reason == "stop"
    assert found[0].token_ids[-1] == stop


def test_the_models_own_end_tokens_are_the_default():
    model = build(pair_config(stack()))
    first = generate(model, SOURCES[:1], PREFIXES[:1], max_new_tokens=1, stop_token_ids=[])[0].token_ids[0]
    ended = build(pair_config(stack(), eos_token_ids=(1, first)))
    assert generate(ended, SOURCES[:1], PREFIXES[:1], max_new_tokens=5)[0].token_ids == (first,)


def test_an_empty_source_is_allowed():
    """A prompt of one token leaves the encoder of a continuing pair without input."""
    model = build(
        pair_config(stack(), layout="merged", reads="aligned", cross_rope=True, decoder_positions="continue")
    )
    found = generate(model, [[], [5, 6]], [[7], [7]], max_new_tokens=4, stop_token_ids=[])
    alone = generate(model, [[]], [[7]], max_new_tokens=4, stop_token_ids=[])
    assert found[0] == alone[0]


def test_sampling_is_seeded_and_stays_within_top_k():
    model = build(pair_config(stack()))
    sampling = Sampling(temperature=1.5, seed=3)
    a, b = (
        generate(model, SOURCES, PREFIXES, max_new_tokens=8, sampling=sampling, stop_token_ids=[])
        for _ in "ab"
    )
    assert a == b
    other = Sampling(temperature=1.5, seed=4)
    assert a != generate(model, SOURCES, PREFIXES, max_new_tokens=8, sampling=other, stop_token_ids=[])
    one = Sampling(temperature=1.5, top_k=1)
    greedy = generate(model, SOURCES, PREFIXES, max_new_tokens=8, stop_token_ids=[])
    assert generate(model, SOURCES, PREFIXES, max_new_tokens=8, sampling=one, stop_token_ids=[]) == greedy


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([], []), "at least one source"),
        (([[5]], []), "1 sources and 0 prefixes"),
        (([[5]], [[]]), "row 0 has an empty decoder prefix"),
        (([[5, 40]], [[2]]), "from 2 to 40; the vocabulary is 0 to 39"),
        (([[5] * 65], [[2]]), "source of 65 tokens is longer"),
        (([[5]], [[2] * 62]), "pass the decoder's max_position_embeddings of 64"),
    ],
)
def test_bad_input(arguments, match):
    model = build(pair_config(stack()))
    with pytest.raises(ValueError, match=match):
        generate(model, *arguments, max_new_tokens=4)


def test_bad_length():
    model = build(pair_config(stack()))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        generate(model, [[5]], [[2]], max_new_tokens=0)
    continuing = build(pair_config(stack(), decoder_positions="continue"))
    with pytest.raises(ValueError, match="62 tokens before the first new one"):
        generate(continuing, [[5] * 61], [[2]], max_new_tokens=4)
