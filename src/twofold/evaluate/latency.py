"""How long a model takes on this machine: measured with the engine, at the lengths that its tasks have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from twofold.evaluate.contender import open_contender
from twofold.evaluate.machine import hardware
from twofold.infer.backends import BackendName, Precision
from twofold.infer.bench import BatchFigures, Plan, run_apart, time_batches
from twofold.infer.timing import make_engine


class Lengths(NamedTuple):
    """Of one answer, in tokens."""

    source: int
    target: int

    @classmethod
    def nearest(cls, source: float, target: float) -> Lengths:
        """Whole numbers of at least 1, for means over requests."""
        return cls(max(1, round(source)), max(1, round(target)))


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySettings:
    """How models are timed. All models of a report share it.

    Raises:
        ValueError: a number below 1.
    """

    precision: Precision = "float32"
    backend: BackendName = "auto"
    batch_size: int = 8
    """For the throughput; everything else is measured at batch 1."""
    runs: int = 3
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "runs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """At one pair of lengths and one batch size; median, min and max over runs."""

    lengths: Lengths
    batch_size: int
    first_token_s: dict[str, float]
    """Until every row had its first token."""
    total_s: dict[str, float]
    """Until every row had its last token."""
    decode_tokens_per_s: dict[str, float] | None
    """Of all rows after their first tokens; None for targets of one token."""

    @property
    def token_s(self) -> float | None:
        """Between two tokens of a row."""
        rates = self.decode_tokens_per_s
        return None if rates is None else self.batch_size / rates["median"]

    @property
    def tokens_per_s(self) -> float:
        """Written by all rows, reading included."""
        return self.batch_size * self.lengths.target / self.total_s["median"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """What was measured of one model."""

    settings: LatencySettings
    hardware: dict[str, Any]
    timings: tuple[Timing, ...]

    def at(self, lengths: Lengths, batch_size: int = 1) -> Timing | None:
        """None where it was not measured."""
        found = (t for t in self.timings if (t.lengths, t.batch_size) == (lengths, batch_size))
        return next(found, None)

    def missing(self, wanted: Iterable[tuple[Lengths, int]]) -> list[tuple[Lengths, int]]:
        """Of lengths and batch sizes those that were not measured, each once, in order."""
        return [one for one in dict.fromkeys(wanted) if self.at(*one) is None]

    def also(self, other: Latency) -> Latency:
        """With the timings of another, of the same settings and hardware."""
        return replace(self, timings=self.timings + other.timings)

    @classmethod
    def read(cls, found: dict[str, Any]) -> Latency:
        """What `dataclasses.asdict` made of one, back from JSON."""
        timings = [Timing(**{**one, "lengths": Lengths(*one["lengths"])}) for one in found["timings"]]
        return cls(
            settings=LatencySettings(**found["settings"]), hardware=found["hardware"], timings=tuple(timings)
        )


def measure_latency(
    model: str, settings: LatencySettings, wanted: Sequence[tuple[Lengths, int]], *, skip_vision: bool = False
) -> Latency:
    """Time a model in a process of its own, which has the machine to itself as far as this one goes.

    Args:
        model: see `open_contender`.
        settings: how.
        wanted: lengths and batch sizes; sources are random tokens, and every target has exactly its length.
        skip_vision: see `twofold.load`.

    Raises:
        ValueError, FileNotFoundError: as for `open_contender` and `make_engine`, or lengths that do not fit.
        EndedError: the process was ended by the system.
    """
    batch_sizes: dict[Lengths, list[int]] = {}
    for lengths, batch_size in dict.fromkeys(wanted):
        batch_sizes.setdefault(lengths, []).append(batch_size)
    plans = [
        Plan(
            model=model,
            backend=settings.backend,
            precision=settings.precision,
            source_tokens=lengths.source,
            new_tokens=lengths.target,
            batch_sizes=tuple(sizes),
            runs=settings.runs,
            threads=settings.threads,
            skip_vision=skip_vision,
        )
        for lengths, sizes in batch_sizes.items()
    ]
    found_on, found = run_apart(time_plans, plans)
    timings = [
        _timing(lengths, figures)
        for lengths, batches in zip(batch_sizes, found, strict=True)
        for figures in batches
    ]
    return Latency(settings=settings, hardware=found_on, timings=tuple(timings))


def time_plans(plans: Sequence[Plan]) -> tuple[dict[str, Any], list[tuple[BatchFigures, ...]]]:
    """Time one model at several lengths with one engine, in this process.

    Args:
        plans: that differ in lengths and batch sizes.

    Returns:
        The hardware, and the figures of each plan.
    """
    first = plans[0]
    model = open_contender(first.model, dtype=torch.float32, skip_vision=first.skip_vision).model
    config = model.config
    engine = make_engine(
        model,
        backend=first.backend,
        precision=first.precision,
        batch_size=max(size for plan in plans for size in plan.batch_sizes),
        threads=first.threads,
    )
    return hardware(engine.device), [time_batches(engine, config, plan) for plan in plans]


def _timing(lengths: Lengths, figures: BatchFigures) -> Timing:
    found = asdict(figures)
    del found["peak_bytes"]
    return Timing(lengths=lengths, **found)
