"""PrefixLM: the first part of a text is read, the rest is written.

T5Gemma cuts into two equal halves (paper A, section 3); the UL2 release draws the cut
(`random_prefix_noise_mask`). No token is added, so the inverse is concatenation.
"""

from typing import Literal

import numpy as np

from twofold.objectives.pair import Pair, Tokens


def split_point(length: int, how: Literal["half", "uniform"], rng: np.random.Generator) -> int:
    """Where to cut a sequence.

    Args:
        length: tokens in the sequence, at least 2.
        how: `half` gives `length // 2`; `uniform` draws from 1..length-1, so that neither part is empty.
        rng: used by `uniform` only.

    Raises:
        ValueError: the sequence has fewer than 2 tokens.
    """
    if length < 2:
        raise ValueError(f"a sequence must have at least 2 tokens to be cut in two, got {length}")
    return length // 2 if how == "half" else int(rng.integers(1, length))


def prefix_lm(tokens: Tokens, split: int) -> Pair:
    """Cut `tokens` before index `split`.

    Raises:
        ValueError: `split` would leave one part empty.
    """
    if not 1 <= split <= len(tokens) - 1:
        raise ValueError(
            f"split must leave a token on each side: 1..{len(tokens) - 1} for {len(tokens)} tokens, got "
            f"{split}"
        )
    return Pair(tokens[:split], tokens[split:], np.arange(split, len(tokens)))


def join(pair: Pair) -> Tokens:
    """The text that `prefix_lm` cut."""
    return np.concatenate([pair.source, pair.target])


def prefix_lm_raw_length(source_budget: int, target_budget: int, how: Literal["half", "uniform"]) -> int:
    """The largest length of which every cut fits: source and target within their budgets, in tokens.

    A drawn cut may put all tokens but one on either side, so `uniform` allows only the smaller budget plus
    one.

    Raises:
        ValueError: not even 2 tokens fit.
    """
    if source_budget < 1 or target_budget < 1:
        raise ValueError(
            f"a cut needs room for one token on each side, got budgets of {source_budget} source and "
            f"{target_budget} target tokens; raise source_length or target_length"
        )
    if how == "half":
        return min(2 * source_budget + 1, 2 * target_budget)
    return min(source_budget, target_budget) + 1
