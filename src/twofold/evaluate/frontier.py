"""Quality against cost: scores of several models and what they cost, brought together.

Scores are in points, 100 being a metric's best value, so that tasks with different metrics can be averaged. A model's
cost is that of one request of each task, at that task's own mean lengths, averaged over tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from twofold.evaluate.bootstrap import CONFIDENCE, DRAWS, Estimate, Floats, estimate, mean_of, resampled_means
from twofold.evaluate.comparable import demand_alike, differences, latency_differences, shared_tasks
from twofold.evaluate.contender import Kind
from twofold.evaluate.cost import Cost, Footprint, answer_flops, footprint
from twofold.evaluate.latency import LatencySettings, Lengths, Timing
from twofold.evaluate.results import Evaluation, TaskResult
from twofold.infer.backends import Precision

LEAST_TARGET = 16
"""Tokens written at the lengths that all models are timed at: fewer do not show the time between two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEntry:
    """One model on one task."""

    metric: str
    score: Estimate
    """In points."""
    difference: Estimate | None
    """To the baseline, in points, over the same examples; None for the baseline."""
    n: int
    n_truncated: int
    lengths: Lengths
    """Of a request."""
    reading_flops: int | None
    writing_flops: int | None
    latency_s: dict[str, float] | None
    """Batch 1, from request to last token; median, min and max."""

    @property
    def flops(self) -> int | None:
        """Of a request."""
        if self.reading_flops is None or self.writing_flops is None:
            return None
        return self.reading_flops + self.writing_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One model. Costs are None where they are not known."""

    name: str
    path: str
    kind: Kind
    parameters: int
    tasks: dict[str, TaskEntry]
    score: Estimate
    """Mean over tasks, in points."""
    difference: Estimate | None
    footprint: Footprint | None
    flops: float | None
    """Of a request, mean over tasks."""
    latency_s: dict[str, float] | None
    """Of a request at batch 1, mean over tasks; or at the reference lengths where these were asked for."""
    reference: Timing | None
    """Batch 1 at the reference lengths."""
    throughput: Timing | None
    """The whole batch at the reference lengths."""

    @property
    def latency_median_s(self) -> float | None:
        return None if self.latency_s is None else self.latency_s["median"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """All models of a report."""

    entries: tuple[Entry, ...]
    """Best score first."""
    tasks: tuple[str, ...]
    """That all models have, in the first one's order."""
    left_out: tuple[str, ...]
    """Tasks that only some have, or where less is better."""
    baseline: str
    reference: Lengths
    is_at_reference: bool
    """`Entry.latency_s` is at the reference lengths, not at the tasks' own."""
    precision: Precision
    latency_settings: LatencySettings | None
    on_flops: tuple[str, ...]
    """Names of the models that no other beats in both score and FLOPs, cheapest first."""
    on_latency: tuple[str, ...]
    settings: dict[str, Any]
    """Of the evaluations, which they share."""
    warnings: tuple[str, ...]
    evaluations: tuple[dict[str, Any], ...]
    """Of each model, in the order given: versions, hardware, command, date, seconds."""
    measured_on: dict[str, Any] | None
    """Hardware of the latencies."""
    draws: int
    confidence: float
    seed: int

    def entry(self, name: str) -> Entry:
        """By name."""
        return next(entry for entry in self.entries if entry.name == name)

    def as_json(self) -> dict[str, Any]:
        """Every number of the report."""
        return asdict(self)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, quality) points are worth their cost.

    A point stays unless another costs no more and is no worse, and is better in one of the two. Equal points stay.

    Returns:
        Indices, cheapest first, in the given order where costs are equal.
    """

    def is_beaten(cost: float, quality: float) -> bool:
        return any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)

    kept = [i for i, point in enumerate(points) if not is_beaten(*point)]
    return sorted(kept, key=lambda i: points[i][0])


def reference_lengths(
    evaluations: Sequence[Evaluation], tasks: Sequence[str], configs: Iterable[Cost] = ()
) -> Lengths:
    """Lengths at which all models are timed side by side: the mean over models and tasks, long enough to show the time
    between two tokens, and within what every model can take."""
    results = [evaluation.tasks[task] for evaluation in evaluations for task in tasks]
    mean = Lengths.nearest(fmean(r.source_tokens for r in results), fmean(r.target_tokens for r in results))
    target = max(mean.target, LEAST_TARGET)
    limits = [
        min(side.max_position_embeddings for side in (cost.config.encoder, cost.config.decoder))
        for cost in configs
    ]
    room = min(limits, default=mean.source + target + 1) - target - 1
    return Lengths(max(1, min(mean.source, room)), target)


def wanted_timings(
    evaluation: Evaluation,
    tasks: Sequence[str],
    reference: Lengths,
    batch_size: int,
    *,
    at_reference: bool = False,
) -> list[tuple[Lengths, int]]:
    """Lengths and batch sizes at which a report needs a model timed."""
    own = [] if at_reference else [(lengths_of(evaluation.tasks[task]), 1) for task in tasks]
    return list(dict.fromkeys([*own, (reference, 1), (reference, batch_size)]))


def lengths_of(result: TaskResult) -> Lengths:
    """Mean lengths of a task's requests, in whole tokens."""
    return Lengths.nearest(result.source_tokens, result.target_tokens)


def frontier(
    evaluations: Sequence[Evaluation],
    costs: Mapping[str, Cost],
    *,
    tasks: Iterable[str] | None = None,
    baseline: str | None = None,
    precision: Precision = "float32",
    reference: Lengths | None = None,
    allows_differences: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Frontier:
    """Bring scores and costs together.

    Args:
        evaluations: one for each model, with names of their own.
        costs: by name; a model without one has scores only.
        tasks: these alone; default: all that every model has.
        baseline: the model the others are compared with; default: the first decoder-only one, else the first.
        precision: of weight and cache bytes.
        reference: latencies are those at these lengths; default: at each task's own, and at `reference_lengths` what
            is compared side by side.
        allows_differences: settings that differ are a warning in the report, not an error.
        draws: of the bootstrap.
        seed: of its generator.

    Raises:
        ValueError: no models, two of one name, an unknown baseline, no shared task, or settings that differ.
    """
    names = [evaluation.model for evaluation in evaluations]
    if not names:
        raise ValueError("no evaluations given; a frontier needs at least one model")
    if len(set(names)) < len(names):
        raise ValueError(f"two models have the same name in {', '.join(names)}; name them apart, NAME=PATH")
    baseline = baseline or next((e.model for e in evaluations if e.kind == "decoder-only"), names[0])
    if baseline not in names:
        raise ValueError(f"no model is named {baseline!r}; the baseline is one of {', '.join(names)}")
    chosen = shared_tasks(evaluations, tasks)
    unequal = differences(evaluations, chosen)
    latencies = {name: cost.latency for name, cost in costs.items() if cost.latency is not None}
    unequal += latency_differences(latencies)
    if not allows_differences:
        demand_alike(unequal)
    timed_at = reference or reference_lengths(evaluations, chosen, costs.values())
    drawn = _draw(evaluations, chosen, draws, seed)
    entries = [
        _entry(
            evaluation,
            evaluations[names.index(baseline)],
            chosen,
            drawn,
            costs.get(evaluation.model),
            precision,
            timed_at,
            at_reference=reference is not None,
        )
        for evaluation in evaluations
    ]
    entries.sort(key=lambda entry: -entry.score.value)
    every_task = dict.fromkeys(task for evaluation in evaluations for task in evaluation.tasks)
    any_latency = next(iter(latencies.values()), None)
    return Frontier(
        entries=tuple(entries),
        tasks=chosen,
        left_out=tuple(task for task in every_task if task not in chosen),
        baseline=baseline,
        reference=timed_at,
        is_at_reference=reference is not None,
        precision=precision,
        latency_settings=None if any_latency is None else any_latency.settings,
        on_flops=_on_frontier(entries, {e.name: e.flops for e in entries}),
        on_latency=_on_frontier(entries, {e.name: e.latency_median_s for e in entries}),
        settings=evaluations[0].settings,
        warnings=tuple(unequal),
        evaluations=tuple(
            {key: getattr(e, key) for key in ("model", "versions", "hardware", "command", "date", "seconds")}
            for e in evaluations
        ),
        measured_on=None if any_latency is None else any_latency.hardware,
        draws=draws,
        confidence=CONFIDENCE,
        seed=seed,
    )


def _draw(
    evaluations: Sequence[Evaluation], tasks: Sequence[str], draws: int, seed: int
) -> dict[tuple[str, str], Floats]:
    """Resampled scores in points, by model and task; only of those with values of single examples."""
    found: dict[tuple[str, str], Floats] = {}
    for task in tasks:
        results = {e.model: e.tasks[task] for e in evaluations if e.tasks[task].values}
        for n in sorted({len(result.values) for result in results.values()}):
            same = {name: result for name, result in results.items() if len(result.values) == n}
            means_RM = resampled_means([r.values for r in same.values()], task=task, draws=draws, seed=seed)
            for column, (name, result) in enumerate(same.items()):
                found[name, task] = 100 / result.scale * means_RM[:, column]
    return found


def _entry(
    evaluation: Evaluation,
    baseline: Evaluation,
    tasks: Sequence[str],
    drawn: Mapping[tuple[str, str], Floats],
    cost: Cost | None,
    precision: Precision,
    reference: Lengths,
    *,
    at_reference: bool,
) -> Entry:
    name, is_baseline = evaluation.model, evaluation is baseline
    latency = None if cost is None else cost.latency
    entries: dict[str, TaskEntry] = {}
    shifts: list[Floats | None] = []
    for task in tasks:
        result = evaluation.tasks[task]
        points, base_points = _points(result), _points(baseline.tasks[task])
        shift = _difference(drawn, evaluation, baseline, task)
        shifts.append(shift)
        lengths = lengths_of(result)
        flops = None if cost is None else answer_flops(cost.config, *lengths)
        timing = None if latency is None else latency.at(lengths)
        entries[task] = TaskEntry(
            metric=result.metric,
            score=estimate(points, drawn.get((name, task))),
            difference=None if is_baseline else estimate(points - base_points, shift),
            n=result.n,
            n_truncated=result.n_truncated,
            lengths=lengths,
            reading_flops=None if flops is None else flops.reading,
            writing_flops=None if flops is None else flops.writing,
            latency_s=None if timing is None else timing.total_s,
        )
    score = fmean(entry.score.value for entry in entries.values())
    base_score = fmean(_points(baseline.tasks[task]) for task in tasks)
    side_by_side = None if latency is None else latency.at(reference)
    if at_reference:
        answer_s = None if side_by_side is None else side_by_side.total_s
    else:
        answer_s = _mean_spread([entry.latency_s for entry in entries.values()])
    per_task = [entry.flops for entry in entries.values() if entry.flops is not None]
    batch_size = 1 if latency is None else latency.settings.batch_size
    return Entry(
        name=name,
        path=evaluation.path,
        kind=evaluation.kind,
        parameters=evaluation.parameters,
        tasks=entries,
        score=estimate(score, mean_of([drawn.get((name, task)) for task in tasks])),
        difference=None if is_baseline else estimate(score - base_score, mean_of(shifts)),
        footprint=None if cost is None else footprint(cost.config, precision),
        flops=fmean(per_task) if per_task else None,
        latency_s=answer_s,
        reference=side_by_side,
        throughput=None if latency is None else latency.at(reference, batch_size),
    )


def _points(result: TaskResult) -> float:
    return 100 * result.value / result.scale


def _difference(
    drawn: Mapping[tuple[str, str], Floats], ours: Evaluation, base: Evaluation, task: str
) -> Floats | None:
    """Between draws of the same examples; None where there are none, or of other examples."""
    if len(ours.tasks[task].values) != len(base.tasks[task].values) or not ours.tasks[task].values:
        return None
    return drawn[ours.model, task] - drawn[base.model, task]


def _mean_spread(spreads: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    known = [spread for spread in spreads if spread is not None]
    if len(known) < len(spreads):
        return None
    return {key: fmean(spread[key] for spread in known) for key in ("median", "min", "max")}


def _on_frontier(entries: Sequence[Entry], costs: Mapping[str, float | None]) -> tuple[str, ...]:
    known = [(entry.name, cost) for entry in entries if (cost := costs[entry.name]) is not None]
    scores = {entry.name: entry.score.value for entry in entries}
    return tuple(known[i][0] for i in pareto([(cost, scores[name]) for name, cost in known]))
