import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.objectives.span_corruption import (
    lengths_after,
    noise_mask,
    num_noise_tokens,
    num_spans,
    raw_length_for,
    restore,
    span_corruption,
)

SENTINELS = list(range(999, 499, -1))
densities = st.floats(0.01, 0.99)
span_lengths = st.floats(1, 20)


def runs(mask):
    """Lengths of the runs of True, by a plain loop."""
    lengths, previous = [], False
    for value in mask.tolist():
        if value and not previous:
            lengths.append(0)
        if value:
            lengths[-1] += 1
        previous = value
    return lengths


def test_t5_lengths_without_their_eos():
    # T5: noise 0.15, mean 3, inputs 512 -> 568 raw tokens, targets 114, each with one EOS.
    assert raw_length_for(511, 10_000, 0.15, 3) == 568
    assert lengths_after(568, 0.15, 3) == (511, 113)


@pytest.mark.parametrize(
    ("mean", "density", "spans", "lengths"),
    [
        (3, 0.15, 819, (14745, 3277)),
        (12, 0.5, 683, (8875, 8875)),
        (32, 0.15, 77, (14003, 2535)),
        (32, 0.5, 256, (8448, 8448)),
    ],
)
def test_published_lengths_at_16384(mean, density, spans, lengths):
    assert num_spans(16384, density, mean) == spans
    assert lengths_after(16384, density, mean) == lengths


def test_other_sentinel_counts_and_rounding():
    assert num_spans(8192, 0.15, 3) == 410
    assert num_spans(512, 0.5, 3) == 85
    assert num_spans(8192, 0.5, 3) == 1365
    assert num_noise_tokens(10, 0.25) == 2  # 2.5 rounds to even, as in T5
    assert num_noise_tokens(10, 0.01) == 1
    assert num_noise_tokens(10, 0.99) == 9
    assert num_spans(10, 0.8, 1) == 2  # only two kept tokens to stand before spans


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), densities, span_lengths, st.integers(0, 9))
def test_mask_follows_the_rules(length, density, mean, seed):
    mask = noise_mask(length, density, mean, np.random.default_rng(seed))
    assert len(mask) == length
    assert not mask[0]
    assert mask[-1]
    assert mask.sum() == min(max(round(length * density), 1), length - 1)
    assert len(runs(mask)) == num_spans(length, density, mean)


def test_every_partition_is_equally_likely():
    # 8 tokens, 4 noise in 2 spans: 3 ways to cut the noise times 3 to cut the rest.
    rng = np.random.default_rng(0)
    masks = [tuple(noise_mask(8, 0.5, 2, rng).tolist()) for _ in range(9000)]
    counts = [masks.count(mask) for mask in set(masks)]
    assert len(counts) == 9
    assert min(counts) > 850
    assert max(counts) < 1150


def test_pair_by_hand():
    tokens = np.arange(10, 20)
    rng = np.random.default_rng(3)
    mask = noise_mask(10, 0.4, 2, np.random.default_rng(3)).tolist()
    pair = span_corruption(tokens, noise_density=0.4, mean_span_length=2, sentinel_ids=SENTINELS, rng=rng)
    source, target, spans = [], [], 0
    for i, token in enumerate(tokens.tolist()):
        if mask[i] and not mask[i - 1]:
            source.append(999 - spans)
            target.append(999 - spans)
            spans += 1
        (target if mask[i] else source).append(token)
    assert spans == 2
    assert pair.source.tolist() == source
    assert pair.target.tolist() == target
    assert tokens.tolist() == list(range(10, 20))


def test_sentinels_are_used_in_the_order_given():
    pair = span_corruption(
        np.arange(4),
        noise_density=0.5,
        mean_span_length=1,
        sentinel_ids=[7, 9, 8],
        rng=np.random.default_rng(0),
    )
    assert pair.source.tolist() == [0, 7, 2, 9]
    assert pair.target.tolist() == [7, 1, 9, 3]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=2, max_size=120), densities, span_lengths, st.integers(0, 9))
def test_restore_is_the_inverse(tokens, density, mean, seed):
    pair = span_corruption(
        np.asarray(tokens),
        noise_density=density,
        mean_span_length=mean,
        sentinel_ids=SENTINELS,
        rng=np.random.default_rng(seed),
    )
    assert (len(pair.source), len(pair.target)) == lengths_after(len(tokens), density, mean)
    assert restore(pair.source, pair.target, SENTINELS).tolist() == tokens


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), densities, span_lengths)
def test_raw_length_is_the_largest_that_fits(source_budget, target_budget, density, mean):
    expected = max(
        n
        for n in range(2, 130)
        if lengths_after(n, density, mean)[0] <= source_budget
        and lengths_after(n, density, mean)[1] <= target_budget
    )
    assert raw_length_for(source_budget, target_budget, density, mean) == expected


def test_errors_name_numbers():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="need 3 sentinels, 2 are available"):
        span_corruption(np.arange(60), noise_density=0.15, mean_span_length=3, sentinel_ids=[98, 99], rng=rng)
    with pytest.raises(ValueError, match=r"contains sentinel ids \[999\]"):
        span_corruption(
            np.asarray([1, 999, 2]), noise_density=0.5, mean_span_length=3, sentinel_ids=SENTINELS, rng=rng
        )
    with pytest.raises(ValueError, match="at least 2 tokens to be corrupted, got 1"):
        num_noise_tokens(1, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        num_noise_tokens(4, 1.0)
    with pytest.raises(ValueError, match=r"at least 1 token, got 0\.5"):
        num_spans(4, 0.5, 0.5)
    with pytest.raises(ValueError, match="budgets of 1 and 9"):
        raw_length_for(1, 9, 0.15, 3)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([1, 99, 2], [98, 5], "same sentinels in the order"),
        ([1, 99, 2, 98], [98, 5, 99, 6], "same sentinels in the order"),
        ([1, 99, 2], [99, 5, 98, 6], "same sentinels in the order"),
        ([1, 99, 2], [5, 99, 6], "must start with sentinel 99"),
        ([1, 2], [5], "must start with sentinel 99"),
        ([1, 99, 2, 98], [99, 98, 6], "empty span"),
        ([1, 99], [99], "empty span"),
    ],
)
def test_restore_refuses_malformed_pairs(source, target, message):
    with pytest.raises(ValueError, match=message):
        restore(np.asarray(source), np.asarray(target), [99, 98, 97])
