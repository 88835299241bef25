"""UL2: a mixture of denoisers, one drawn for each sequence.

Sources: "UL2: Unifying Language Learning Paradigms", Table 1; the T5Gemma 2 paper's list; UL2R (arXiv
2210.11399).
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from twofold.config.data import Denoiser
from twofold.objectives.pair import Pair, Tokens
from twofold.objectives.prefix_lm import join, prefix_lm, prefix_lm_raw_length, split_point
from twofold.objectives.span_corruption import (
    largest_that_fits,
    num_noise_tokens,
    num_spans,
    raw_length_for,
    restore,
    span_corruption,
)

__all__ = [
    "PRESETS",
    "Denoiser",
    "Mixture",
    "denoise",
    "draw_denoiser",
    "restore_ul2",
    "sentinels_needed",
    "ul2",
    "ul2_raw_lengths",
]

Mixture: TypeAlias = tuple[tuple[Denoiser, float], ...]
"""Denoisers with their weights, which need not sum to 1."""


def _span(mean_span_length: float, noise_density: float, mode_token: str | None = None) -> Denoiser:
    return Denoiser(
        kind="span", mean_span_length=mean_span_length, noise_density=noise_density, mode_token=mode_token
    )


PRESETS: dict[str, Mixture] = {
    # UL2 Table 1 with the paper's mode tokens; seven denoisers, uniform.
    "ul2": (
        (_span(3, 0.15, "[R]"), 1.0),
        (_span(8, 0.15, "[R]"), 1.0),
        (Denoiser(kind="suffix", noise_density=0.25, mode_token="[S]"), 1.0),
        (_span(3, 0.5, "[X]"), 1.0),
        (_span(8, 0.5, "[X]"), 1.0),
        (_span(64, 0.15, "[X]"), 1.0),
        (_span(64, 0.5, "[X]"), 1.0),
    ),
    # T5Gemma 2: no mode token, half of the sequences predict their last three quarters.
    "t5gemma2": (
        (_span(3, 0.15), 1.0),
        (_span(12, 0.5), 1.0),
        (_span(32, 0.15), 1.0),
        (_span(32, 0.5), 1.0),
        (Denoiser(kind="suffix", noise_density=0.75), 4.0),
    ),
    # UL2R: half PrefixLM, a quarter extreme (long spans or half of the tokens), a quarter regular.
    "ul2r": (
        (Denoiser(kind="suffix", noise_density=0.5, split="uniform"), 4.0),
        (_span(32, 0.15), 1.0),
        (_span(3, 0.5), 1.0),
        (_span(3, 0.15), 2.0),
    ),
}


def _mean_span_length(denoiser: Denoiser) -> float:
    assert denoiser.mean_span_length is not None  # Denoiser requires it of kind "span"
    return denoiser.mean_span_length


def sentinels_needed(mixture: Mixture, raw_lengths: Sequence[int]) -> int:
    """How many sentinels the mixture needs at most, each denoiser for sequences of up to its raw length."""
    return max(
        (
            num_spans(length, d.noise_density, _mean_span_length(d))
            for (d, _), length in zip(mixture, raw_lengths, strict=True)
            if d.kind == "span"
        ),
        default=0,
    )


def _mode(denoiser: Denoiser, mode_ids: Mapping[str, Sequence[int]]) -> Tokens:
    """The ids of the denoiser's mode token, int64 [M]; empty without one."""
    if denoiser.mode_token is None:
        return np.empty(0, dtype=np.int64)
    if denoiser.mode_token not in mode_ids:
        raise ValueError(
            f"mode token {denoiser.mode_token!r} has no ids; mode_ids knows {sorted(mode_ids)}: give its "
            "tokens there"
        )
    return np.asarray(mode_ids[denoiser.mode_token], dtype=np.int64)


def ul2_raw_lengths(
    mixture: Mixture, source_budget: int, target_budget: int, mode_ids: Mapping[str, Sequence[int]]
) -> tuple[int, ...]:
    """The largest raw length of each denoiser that fits both budgets, mode token included.

    Denoisers fill the two sides so differently that one length for all would leave rows half empty; T5's
    preprocessors choose one per task too (`random_spans_helper`).

    Raises:
        ValueError: a denoiser fits not even 2 tokens.
    """
    return tuple(
        _denoiser_raw_length(d, source_budget - len(_mode(d, mode_ids)), target_budget) for d, _ in mixture
    )


def _denoiser_raw_length(denoiser: Denoiser, source_budget: int, target_budget: int) -> int:
    if denoiser.kind == "span":
        return raw_length_for(
            source_budget, target_budget, denoiser.noise_density, _mean_span_length(denoiser)
        )
    if denoiser.split == "uniform":
        return prefix_lm_raw_length(source_budget, target_budget, "uniform")
    if source_budget < 1 or target_budget < 1:
        raise ValueError(
            f"a suffix denoiser needs at least 1 source and 1 target token, got budgets of {source_budget} "
            f"and {target_budget}; raise source_length or target_length"
        )

    def fits(length: int) -> bool:
        num_target = num_noise_tokens(length, denoiser.noise_density)
        return num_target <= target_budget and length - num_target <= source_budget

    return largest_that_fits(fits, source_budget + target_budget)


def _probabilities(mixture: Mixture) -> npt.NDArray[np.float64]:
    weights = np.asarray([weight for _, weight in mixture], dtype=np.float64)
    if len(weights) == 0 or (weights <= 0).any():
        raise ValueError(f"a mixture needs denoisers with weights above 0, got weights {weights.tolist()}")
    probabilities: npt.NDArray[np.float64] = weights / weights.sum()
    return probabilities


def draw_denoiser(mixture: Mixture, rng: np.random.Generator) -> int:
    """The index of a denoiser, drawn by weight.

    Raises:
        ValueError: weights that are not above 0.
    """
    return int(rng.choice(len(mixture), p=_probabilities(mixture)))


def denoise(
    tokens: Tokens,
    denoiser: Denoiser,
    sentinel_ids: Sequence[int],
    rng: np.random.Generator,
    mode_ids: Mapping[str, Sequence[int]],
) -> Pair:
    """Apply one denoiser.

    Args:
        tokens: int64 [length], at least 2.
        denoiser: of a mixture.
        sentinel_ids: in order of use; span denoisers only.
        rng: draws the spans or the cut.
        mode_ids: token ids of each mode token, put in front of the source.

    Returns:
        The pair, without EOS.

    Raises:
        ValueError: see `span_corruption`; or a mode token without ids.
    """
    if denoiser.kind == "span":
        pair = span_corruption(
            tokens,
            noise_density=denoiser.noise_density,
            mean_span_length=_mean_span_length(denoiser),
            sentinel_ids=sentinel_ids,
            rng=rng,
        )
    elif denoiser.split == "uniform":
        pair = prefix_lm(tokens, split_point(len(tokens), "uniform", rng))
    else:
        num_target = num_noise_tokens(len(tokens), denoiser.noise_density)
        pair = prefix_lm(tokens, len(tokens) - num_target)
    mode = _mode(denoiser, mode_ids)
    return pair._replace(source=np.concatenate([mode, pair.source])) if len(mode) else pair


def ul2(
    tokens: Tokens,
    mixture: Mixture,
    sentinel_ids: Sequence[int],
    rng: np.random.Generator,
    mode_ids: Mapping[str, Sequence[int]],
) -> tuple[Pair, Denoiser]:
    """Draw a denoiser by weight and apply it: `draw_denoiser`, then `denoise`.

    Returns:
        The pair, without EOS, and the denoiser that made it.
    """
    denoiser = mixture[draw_denoiser(mixture, rng)][0]
    return denoise(tokens, denoiser, sentinel_ids, rng, mode_ids), denoiser


def restore_ul2(
    pair: Pair, denoiser: Denoiser, sentinel_ids: Sequence[int], mode_ids: Mapping[str, Sequence[int]]
) -> Tokens:
    """The tokens that `ul2` was given.

    Raises:
        ValueError: the source does not start with the denoiser's mode token, or see
            `span_corruption.restore`.
    """
    mode = _mode(denoiser, mode_ids)
    if pair.source[: len(mode)].tolist() != mode.tolist():
        raise ValueError(f"the source must start with mode token {denoiser.mode_token!r} = {mode.tolist()}")
    source = pair.source[len(mode) :]
    if denoiser.kind == "span":
        return restore(source, pair.target, sentinel_ids)
    return join(Pair(source, pair.target))
