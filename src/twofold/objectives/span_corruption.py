"""T5's span corruption, the base of all UL2 denoisers.

Source: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 3.1.4,
and the rules of T5's preprocessors (`random_spans_noise_mask`, `random_spans_helper`). Lengths and pairs
here are *without* EOS: T5 quotes 512 inputs and 114 targets for 568 raw tokens with an EOS on both sides,
here that is 511 and 113.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from twofold.objectives.pair import NOT_OF_THE_TEXT, Pair, Tokens


def num_noise_tokens(length: int, noise_density: float) -> int:
    """How many of `length` tokens go to the target: rounded (half to even), at least 1, at most `length - 1`.

    Raises:
        ValueError: fewer than 2 tokens, or a density outside (0, 1).
    """
    if length < 2:
        raise ValueError(f"a sequence must have at least 2 tokens to be corrupted, got {length}")
    if not 0 < noise_density < 1:
        raise ValueError(f"noise_density must lie between 0 and 1, got {noise_density}")
    return min(max(round(length * noise_density), 1), length - 1)


def num_spans(length: int, noise_density: float, mean_span_length: float) -> int:
    """How many spans, and so sentinels, a sequence of `length` tokens gets; it never falls as `length` grows.

    Raises:
        ValueError: see `num_noise_tokens`; or a mean span length below 1.
    """
    if mean_span_length < 1:
        raise ValueError(f"mean_span_length must be at least 1 token, got {mean_span_length}")
    num_noise = num_noise_tokens(length, noise_density)
    # Each span needs a token of its own and a kept token before it.
    return min(max(1, round(num_noise / mean_span_length)), length - num_noise)


def lengths_after(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Tokens in source and target after corrupting `length` tokens, with sentinels, without EOS."""
    num_noise = num_noise_tokens(length, noise_density)
    spans = num_spans(length, noise_density, mean_span_length)
    return length - num_noise + spans, num_noise + spans


def raw_length_for(
    source_budget: int, target_budget: int, noise_density: float, mean_span_length: float
) -> int:
    """The largest raw length whose corrupted source and target fit their budgets (T5 `random_spans_helper`).

    Args:
        source_budget: tokens for the source with its sentinels. Subtract what is added to it later (BOS,
            EOS, mode token): T5's 512 inputs are a budget of 511.
        target_budget: tokens for the target with its sentinels, without its stop token.
        noise_density: share of the tokens that goes to the target.
        mean_span_length: tokens.

    Raises:
        ValueError: not even 2 raw tokens fit.
    """

    def fits(length: int) -> bool:
        source_len, target_len = lengths_after(length, noise_density, mean_span_length)
        return source_len <= source_budget and target_len <= target_budget

    if not fits(2):
        raise ValueError(
            f"span corruption needs at least 2 source and 2 target tokens, got budgets of {source_budget} "
            f"and {target_budget}; raise source_length or target_length"
        )
    return largest_that_fits(fits, source_budget + target_budget)


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest length in 2..most that fits, by bisection: 2 fits, and below a length that fits all do."""
    low, high = 2, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _random_parts(total: int, num_parts: int, rng: np.random.Generator) -> Tokens:
    """Part `total` into `num_parts` positive integers, each way equally likely; int64 [num_parts]."""
    cuts = np.sort(rng.choice(total - 1, num_parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total).astype(np.int64)


def noise_mask(
    length: int, noise_density: float, mean_span_length: float, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Which tokens are noise, bool [length]; kept and noise spans take turns, the first token is kept."""
    num_noise = num_noise_tokens(length, noise_density)
    spans = num_spans(length, noise_density, mean_span_length)
    noise_lengths = _random_parts(num_noise, spans, rng)
    kept_lengths = _random_parts(length - num_noise, spans, rng)
    turns = np.stack([kept_lengths, noise_lengths], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, turns)


def span_corruption(
    tokens: Tokens,
    *,
    noise_density: float,
    mean_span_length: float,
    sentinel_ids: Sequence[int],
    rng: np.random.Generator,
) -> Pair:
    """Replace random spans by sentinels; the target lists the spans, each after its sentinel.

    Args:
        tokens: int64 [length], at least 2.
        noise_density: share of the tokens that goes to the target.
        mean_span_length: tokens.
        sentinel_ids: used in this order; T5 and T5Gemma 2 count down from the top.
        rng: draws the span lengths.

    Returns:
        Source and target without EOS.

    Raises:
        ValueError: too few tokens or sentinels, or a token that is a sentinel already.
    """
    spans = num_spans(len(tokens), noise_density, mean_span_length)
    if spans > len(sentinel_ids):
        raise ValueError(
            f"{len(tokens)} tokens at noise_density {noise_density} and mean_span_length {mean_span_length} "
            f"need {spans} sentinels, {len(sentinel_ids)} are available; add sentinels or shorten the "
            "sequence"
        )
    if np.isin(tokens, sentinel_ids).any():
        taken = sorted(set(tokens.tolist()) & set(sentinel_ids))
        raise ValueError(
            f"the text contains sentinel ids {taken}, so it could not be restored; remove these tokens from "
            "the text"
        )
    used = np.asarray(sentinel_ids[:spans], dtype=np.int64)
    is_noise = noise_mask(len(tokens), noise_density, mean_span_length, rng)
    starts_span = is_noise & ~np.concatenate([[False], is_noise[:-1]])
    source = tokens.copy()
    source[starts_span] = used
    sentinel_at = np.flatnonzero(starts_span[is_noise])
    target = np.insert(tokens[is_noise], sentinel_at, used)
    origins = np.insert(np.flatnonzero(is_noise), sentinel_at, NOT_OF_THE_TEXT)
    return Pair(source[starts_span | ~is_noise], target, origins)


def restore(source: Tokens, target: Tokens, sentinel_ids: Sequence[int]) -> Tokens:
    """The tokens that `span_corruption` was given, from its result (without EOS).

    Raises:
        ValueError: source and target do not hold the same sentinels, each once, in the order of
            `sentinel_ids`, or the target does not start with one, or a span is empty.
    """
    source_at = np.flatnonzero(np.isin(source, sentinel_ids))
    target_at = np.flatnonzero(np.isin(target, sentinel_ids))
    expected = list(sentinel_ids[: len(target_at)])
    if source[source_at].tolist() != expected or target[target_at].tolist() != expected:
        raise ValueError(
            "source and target must hold the same sentinels in the order given, got "
            f"{source[source_at].tolist()} in the source and {target[target_at].tolist()} in the target"
        )
    if len(target_at) == 0 or target_at[0] != 0:
        raise ValueError(f"the target must start with sentinel {sentinel_ids[0]}, got {target[:1].tolist()}")
    if (np.diff(target_at, append=len(target)) < 2).any():
        raise ValueError("the target has an empty span: a sentinel must be followed by at least one token")
    kept = np.split(source, source_at)
    noise = np.split(target, target_at)
    parts = [kept[0]]
    for noise_span, kept_span in zip(noise[1:], kept[1:], strict=True):
        parts += [noise_span[1:], kept_span[1:]]
    return np.concatenate(parts)
