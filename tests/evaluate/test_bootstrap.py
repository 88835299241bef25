"""Intervals against the closed form, on scores whose spread is known."""

import numpy as np
import pytest

from twofold.evaluate.bootstrap import Estimate, estimate, mean_of, resampled_means


def normal_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error of a large sample, 95%."""
    half = 1.959964 * values.std(ddof=0) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


@pytest.mark.parametrize("kind", ["right or wrong", "scores"])
def test_intervals_are_the_normal_ones_for_many_examples(kind):
    random = np.random.default_rng(3)
    values = random.random(1500) < 0.3 if kind == "right or wrong" else random.gamma(2.0, size=1500)
    drawn = resampled_means([values], task="t", draws=8000)[:, 0]
    found = estimate(values.mean(), drawn)
    low, high = normal_interval(values.astype(float))
    width = high - low
    assert found.low == pytest.approx(low, abs=0.03 * width)
    assert found.high == pytest.approx(high, abs=0.03 * width)
    assert drawn.std() == pytest.approx(width / (2 * 1.959964), rel=0.03)


def test_differences_are_paired():
    """Two models that are right on nearly the same examples differ by far less than each one's own spread."""
    random = np.random.default_rng(4)
    first = (random.random(2000) < 0.5).astype(float)
    second = first.copy()
    second[random.choice(np.flatnonzero(first == 0), 40, replace=False)] = 1.0
    drawn = resampled_means([first, second], task="t", draws=8000)
    found = estimate(second.mean() - first.mean(), drawn[:, 1] - drawn[:, 0])
    low, high = normal_interval(second - first)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))
    assert low > 0
    assert found.leaves_out(0.0)
    unpaired = np.sqrt(drawn[:, 0].var() + drawn[:, 1].var())
    assert (drawn[:, 1] - drawn[:, 0]).std() < 0.25 * unpaired


def test_the_mean_over_tasks_has_the_spread_of_independent_tasks():
    random = np.random.default_rng(5)
    tasks = {name: random.random(600) for name in "abc"}
    drawn = [resampled_means([values], task=name, draws=8000)[:, 0] for name, values in tasks.items()]
    errors = [values.std() / np.sqrt(len(values)) for values in tasks.values()]
    mean = mean_of(drawn)
    assert mean.std() == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 3, rel=0.04)
    assert mean_of([*drawn, None]) is None
    assert mean_of([]) is None


def test_the_same_seed_gives_the_same_draws_whoever_else_is_there():
    values = np.arange(50.0)
    one = resampled_means([values], task="t", draws=30, seed=2)
    assert np.array_equal(one, resampled_means([values, values[::-1]], task="t", draws=30, seed=2)[:, :1])
    assert not np.array_equal(one, resampled_means([values], task="t", draws=30, seed=3))
    assert not np.array_equal(one, resampled_means([values], task="u", draws=30, seed=2))


def test_drawing_in_pieces_leaves_nothing_out(monkeypatch):
    monkeypatch.setattr("twofold.evaluate.bootstrap._AT_ONCE", 70)
    assert resampled_means([np.arange(20.0)], task="t", draws=11).shape == (11, 1)


def test_what_cannot_be_drawn():
    assert estimate(3.0, None) == Estimate(3.0)
    assert not Estimate(3.0).leaves_out(0.0)
    with pytest.raises(ValueError, match="'t' has no examples"):
        resampled_means([[]], task="t")
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        resampled_means([[1.0]], task="t", draws=0)
