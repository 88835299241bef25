"""Every objective says which token of the text each target token is."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twofold.objectives import NOT_OF_THE_TEXT, PRESETS, prefix_lm, span_corruption, ul2

SENTINELS = list(range(2000, 1000, -1))
MODES = {"[R]": [901], "[S]": [902, 903], "[X]": [904]}
texts = st.lists(st.integers(0, 900), min_size=2, max_size=200)


def assert_origins(pair, tokens):
    assert len(pair.origins) == len(pair.target)
    of_text = pair.origins != NOT_OF_THE_TEXT
    assert np.array_equal(tokens[pair.origins[of_text]], pair.target[of_text])
    assert (np.diff(pair.origins[of_text]) > 0).all()
    # All else is sentinels, and no sentinel is taken for text.
    assert np.array_equal(~of_text, np.isin(pair.target, SENTINELS))


@given(texts, st.data())
def test_prefix_lm(tokens, data):
    tokens = np.asarray(tokens)
    split = data.draw(st.integers(1, len(tokens) - 1))
    pair = prefix_lm(tokens, split)
    assert_origins(pair, tokens)
    assert pair.origins.tolist() == list(range(split, len(tokens)))


@given(texts, st.floats(0.05, 0.9), st.floats(1, 9), st.integers(0, 2**32))
def test_span_corruption(tokens, density, mean, seed):
    tokens = np.asarray(tokens)
    pair = span_corruption(
        tokens,
        noise_density=density,
        mean_span_length=mean,
        sentinel_ids=SENTINELS,
        rng=np.random.default_rng(seed),
    )
    assert_origins(pair, tokens)
    # What is not in the target is in the source.
    kept = np.setdiff1d(np.arange(len(tokens)), pair.origins)
    assert tokens[kept].tolist() == pair.source[~np.isin(pair.source, SENTINELS)].tolist()


@given(texts, st.sampled_from(sorted(PRESETS)), st.integers(0, 2**32))
def test_ul2_also_behind_mode_tokens(tokens, preset, seed):
    tokens = np.asarray(tokens)
    pair, _ = ul2(tokens, PRESETS[preset], SENTINELS, np.random.default_rng(seed), MODES)
    assert_origins(pair, tokens)


def test_a_literal_case():
    tokens = np.asarray([10, 11, 12, 13, 14, 15])
    rng = np.random.default_rng(3)
    pair = span_corruption(tokens, noise_density=0.5, mean_span_length=1.5, sentinel_ids=[99, 98], rng=rng)
    wanted = {99: NOT_OF_THE_TEXT, 98: NOT_OF_THE_TEXT, **{10 + i: i for i in range(6)}}
    assert pair.origins.tolist() == [wanted[token] for token in pair.target.tolist()]
