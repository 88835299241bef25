"""How sure a score is: percentile intervals from resampled examples, paired between models.

All models of a task are resampled together, so that a difference between two of them is that of the same examples.

Letters: M models, X examples, R draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS = 2000
CONFIDENCE = 0.95

_AT_ONCE = 4_000_000
"""Examples drawn in one piece: 32 MB of indices."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval."""

    value: float
    low: float | None = None
    """None, like `high`, where there are no values of single examples to draw from."""
    high: float | None = None

    def leaves_out(self, value: float) -> bool:
        """There is an interval, and `value` is outside."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def resampled_means(
    values_MX: npt.ArrayLike, *, task: str, draws: int = DRAWS, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Means over examples drawn with replacement, the same ones for every model.

    Args:
        values_MX: one row of examples for each model.
        task: its name takes part in the seed: tasks are drawn independently, and in the same way whatever others are
            there.
        draws: R.
        seed: of the generator.

    Returns:
        float64 [R, M].

    Raises:
        ValueError: no examples, or fewer than one draw.
    """
    values = np.asarray(values_MX, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"task {task!r} has no examples to draw from; leave it out")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    n = values.shape[1]
    random = np.random.default_rng([seed, zlib.crc32(task.encode())])
    rows = max(1, _AT_ONCE // n)
    means = []
    for start in range(0, draws, rows):
        drawn = random.integers(0, n, size=(min(rows, draws - start), n))
        means.append(np.stack([row[drawn].mean(axis=1) for row in values], axis=1))
    return np.concatenate(means)


def estimate(value: float, drawn_R: Floats | None, confidence: float = CONFIDENCE) -> Estimate:
    """A value with the middle part of what resampling gave; without an interval where there is none."""
    if drawn_R is None:
        return Estimate(value)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(drawn_R, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def mean_of(parts: Sequence[Floats | None]) -> Floats | None:
    """Draws of a mean over tasks from those of each; None where one has none, as its spread would be left out."""
    found = [part for part in parts if part is not None]
    return np.mean(found, axis=0) if found and len(found) == len(parts) else None
