import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.objectives.prefix_lm import join, prefix_lm, prefix_lm_raw_length, split_point


def test_half_gives_the_longer_half_to_the_target():
    rng = np.random.default_rng(0)
    assert [split_point(n, "half", rng) for n in (2, 3, 8, 9)] == [1, 1, 4, 4]


def test_uniform_reaches_every_cut_equally_often():
    rng = np.random.default_rng(0)
    draws = [split_point(5, "uniform", rng) for _ in range(4000)]
    counts = np.bincount(draws, minlength=6)
    assert counts[0] == 0
    assert counts[5] == 0
    assert counts[1:5].min() > 900


def test_cut():
    pair = prefix_lm(np.arange(5), 2)
    assert pair.source.tolist() == [0, 1]
    assert pair.target.tolist() == [2, 3, 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=2, max_size=20), st.data())
def test_join_is_the_inverse(tokens, data):
    split = data.draw(st.integers(1, len(tokens) - 1))
    assert join(prefix_lm(np.asarray(tokens), split)).tolist() == tokens


def test_too_short_and_empty_parts_are_refused():
    with pytest.raises(ValueError, match="at least 2 tokens to be cut in two, got 1"):
        split_point(1, "half", np.random.default_rng(0))
    for split in (0, 3):
        with pytest.raises(ValueError, match=rf"1\.\.2 for 3 tokens, got {split}"):
            prefix_lm(np.arange(3), split)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_raw_length_is_the_largest_whose_cuts_all_fit(source_budget, target_budget):
    def fits(length, how):
        cuts = [length // 2] if how == "half" else range(1, length)
        return all(cut <= source_budget and length - cut <= target_budget for cut in cuts)

    for how in ("half", "uniform"):
        expected = max(length for length in range(2, 80) if fits(length, how))
        assert prefix_lm_raw_length(source_budget, target_budget, how) == expected


def test_raw_length_without_room():
    with pytest.raises(ValueError, match="budgets of 5 source and 0 target tokens"):
        prefix_lm_raw_length(5, 0, "half")
