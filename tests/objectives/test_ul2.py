import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.config.data import ObjectiveConfig
from twofold.objectives.ul2 import (
    PRESETS,
    Denoiser,
    denoise,
    restore_ul2,
    sentinels_needed,
    ul2,
    ul2_raw_lengths,
)

SENTINELS = list(range(2000, 1000, -1))
MODES = {"[R]": [901], "[S]": [902, 903], "[X]": [904]}


def span(mean, density):
    return Denoiser(kind="span", mean_span_length=mean, noise_density=density)


def test_presets_are_the_published_lists():
    assert [(d.kind, d.mean_span_length, d.noise_density, d.mode_token, w) for d, w in PRESETS["ul2"]] == [
        ("span", 3, 0.15, "[R]", 1),
        ("span", 8, 0.15, "[R]", 1),
        ("suffix", None, 0.25, "[S]", 1),
        ("span", 3, 0.5, "[X]", 1),
        ("span", 8, 0.5, "[X]", 1),
        ("span", 64, 0.15, "[X]", 1),
        ("span", 64, 0.5, "[X]", 1),
    ]
    assert [
        (d.kind, d.mean_span_length, d.noise_density, d.mode_token, w) for d, w in PRESETS["t5gemma2"]
    ] == [
        ("span", 3, 0.15, None, 1),
        ("span", 12, 0.5, None, 1),
        ("span", 32, 0.15, None, 1),
        ("span", 32, 0.5, None, 1),
        ("suffix", None, 0.75, None, 4),
    ]
    shares = {(d.kind, d.mean_span_length, d.noise_density): w / 8 for d, w in PRESETS["ul2r"]}
    assert shares == {
        ("suffix", None, 0.5): 0.5,
        ("span", 32, 0.15): 0.125,
        ("span", 3, 0.5): 0.125,
        ("span", 3, 0.15): 0.25,
    }


def test_config_knows_the_presets():
    annotation = ObjectiveConfig.model_fields["preset"].annotation
    literal = next(a for a in typing.get_args(annotation) if a is not type(None))
    assert set(typing.get_args(literal)) == set(PRESETS)


def test_mean_corruption_of_t5gemma2():
    mixture = PRESETS["t5gemma2"]
    total = sum(weight for _, weight in mixture)
    assert sum(d.noise_density * w for d, w in mixture) / total == pytest.approx(0.5375)
    rng = np.random.default_rng(0)
    # Targets without sentinels, over many draws.
    shares = [
        np.sum(ul2(np.arange(1000), mixture, SENTINELS, rng, {})[0].target < 1000) / 1000 for _ in range(2000)
    ]
    assert np.mean(shares) == pytest.approx(0.5375, abs=0.02)


def test_sentinel_budget():
    assert sentinels_needed(PRESETS["t5gemma2"], [16384] * 5) == 819
    assert sentinels_needed(PRESETS["ul2"], [512] * 7) == 85
    assert sentinels_needed(PRESETS["ul2"], [8192] * 7) == 1365
    assert sentinels_needed(((Denoiser(kind="suffix", noise_density=0.75), 1.0),), [16384]) == 0


def test_suffix_takes_the_end_without_a_sentinel():
    mixture = ((Denoiser(kind="suffix", noise_density=0.75), 1.0),)
    pair, denoiser = ul2(np.arange(16384), mixture, [], np.random.default_rng(0), {})
    assert (len(pair.source), len(pair.target)) == (4096, 12288)
    assert pair.target[0] == 4096
    assert denoiser is mixture[0][0]


def test_uniform_suffix_draws_its_cut():
    mixture = ((Denoiser(kind="suffix", noise_density=0.5, split="uniform"), 1.0),)
    rng = np.random.default_rng(0)
    assert {len(ul2(np.arange(4), mixture, [], rng, {})[0].source) for _ in range(100)} == {1, 2, 3}


def test_weights_decide_how_often():
    first, second = span(3, 0.15), span(3, 0.5)
    rng = np.random.default_rng(0)
    drawn = [ul2(np.arange(20), ((first, 3.0), (second, 1.0)), SENTINELS, rng, {})[1] for _ in range(2000)]
    assert sum(d is first for d in drawn) / 2000 == pytest.approx(0.75, abs=0.03)


def test_mode_tokens_stand_in_front_of_the_source():
    mixture = tuple(item for item in PRESETS["ul2"] if item[0].mode_token == "[S]")
    pair, _ = ul2(np.arange(8), mixture, SENTINELS, np.random.default_rng(0), MODES)
    assert pair.source.tolist() == [902, 903, 0, 1, 2, 3, 4, 5]
    assert pair.target.tolist() == [6, 7]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.lists(st.integers(0, 800), min_size=2, max_size=100),
    st.integers(0, 99),
)
def test_restore_is_the_inverse(preset, tokens, seed):
    pair, denoiser = ul2(np.asarray(tokens), PRESETS[preset], SENTINELS, np.random.default_rng(seed), MODES)
    assert restore_ul2(pair, denoiser, SENTINELS, MODES).tolist() == tokens


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PRESETS)), st.integers(5, 60), st.integers(4, 60), st.integers(0, 99))
def test_raw_length_fits_whatever_is_drawn(preset, source_budget, target_budget, seed):
    mixture = PRESETS[preset]
    lengths = ul2_raw_lengths(mixture, source_budget, target_budget, MODES)
    rng = np.random.default_rng(seed)
    for (denoiser, _), length in zip(mixture, lengths, strict=True):
        pair = denoise(np.arange(length), denoiser, SENTINELS, rng, MODES)
        assert len(pair.source) <= source_budget
        assert len(pair.target) <= target_budget


def test_raw_length_is_not_shorter_than_needed():
    suffix = ((Denoiser(kind="suffix", noise_density=0.75), 1.0),)
    assert ul2_raw_lengths(suffix, 4096, 12288, {}) == (16384,)
    assert ul2_raw_lengths(((span(3, 0.15), 1.0),), 511, 4096, {}) == (568,)
    assert ul2_raw_lengths(
        ((Denoiser(kind="suffix", noise_density=0.5, split="uniform"), 1.0),), 7, 5, {}
    ) == (6,)


def test_errors():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"mode token '\[.\]' has no ids"):
        ul2(np.arange(8), PRESETS["ul2"], SENTINELS, rng, {})
    for mixture in ((), ((span(3, 0.5), 0.0),)):
        with pytest.raises(ValueError, match="weights above 0"):
            ul2(np.arange(8), mixture, SENTINELS, rng, {})
    with pytest.raises(ValueError, match="budgets of 0 and 5"):
        ul2_raw_lengths(((Denoiser(kind="suffix", noise_density=0.5), 1.0),), 0, 5, {})
    pair, denoiser = ul2(np.arange(8), PRESETS["ul2"], SENTINELS, rng, MODES)
    with pytest.raises(ValueError, match="must start with mode token"):
        restore_ul2(pair._replace(source=pair.source[1:]), denoiser, SENTINELS, MODES)
