"""Whether evaluations may stand beside each other: the same tasks, asked in the same way, timed on the same machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from twofold.evaluate.latency import Latency
from twofold.evaluate.results import Evaluation

MODEL_SETTINGS = ("kind", "decoder_start", "encoder_positions", "decoder_positions", "rolling_tokens")
"""Settings of an evaluation that follow from the model."""

_WITHOUT_EFFECT = ("tasks", "batch_size")
"""What may differ: tasks are compared one by one, by metric and number of examples too."""


def shared_tasks(evaluations: Sequence[Evaluation], only: Iterable[str] | None = None) -> tuple[str, ...]:
    """Tasks that all evaluations have.

    Args:
        evaluations: at least one.
        only: these tasks alone, in this order. Default: all but those where less is better, which have no place in a
            mean of scores.

    Raises:
        ValueError: there are none, or a task of `only` is missing somewhere or is one where less is better.
    """
    if only is not None:
        chosen = tuple(dict.fromkeys(only))
        for evaluation in evaluations:
            missing = [task for task in chosen if task not in evaluation.tasks]
            if missing:
                raise ValueError(
                    f"{evaluation.model} was not evaluated on {', '.join(missing)}; it has "
                    f"{', '.join(evaluation.tasks) or 'no task'}"
                )
            worse = [task for task in chosen if not evaluation.tasks[task].higher_is_better]
            if worse:
                raise ValueError(
                    f"less is better on {', '.join(worse)}, so they have no place in a mean of scores; leave them out, "
                    "and see them with `twofold eval`"
                )
        return chosen
    first, *others = evaluations
    tasks = tuple(
        task
        for task, result in first.tasks.items()
        if result.higher_is_better and all(task in other.tasks for other in others)
    )
    if not tasks:
        have = "; ".join(f"{e.model}: {', '.join(e.tasks) or 'none'}" for e in evaluations)
        raise ValueError(
            f"the models have no task in common ({have}); evaluate them on the same tasks with `twofold eval`"
        )
    return tasks


def differences(evaluations: Sequence[Evaluation], tasks: Sequence[str]) -> list[str]:
    """What must be equal for scores to be comparable, and is not: one line for each."""
    first, *others = evaluations
    known = {task for evaluation in evaluations for task in evaluation.tasks}
    ours = _compared(first, tasks, known)
    found = []
    for other in others:
        theirs = _compared(other, tasks, known)
        found += [
            f"{key}: {first.model} has {_short(ours.get(key))}, {other.model} has {_short(theirs.get(key))}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
    return found


def _compared(evaluation: Evaluation, tasks: Sequence[str], known: Set[str]) -> dict[str, Any]:
    """Settings by name, those that are given by task only for `tasks`; `known` is what counts as a task's name."""
    found: dict[str, Any] = {}
    for key, value in evaluation.settings.items():
        if key in MODEL_SETTINGS or key in _WITHOUT_EFFECT:
            continue
        if isinstance(value, Mapping) and known & value.keys():
            found |= {f"{key} of {task}": each for task, each in value.items() if task in tasks}
        else:
            found[key] = value
    for task in tasks:
        result = evaluation.tasks[task]
        found |= {
            f"metric of {task}": result.metric,
            f"examples of {task}": result.n,
            f"scale of {task}": result.scale,
        }
    return found


def demand_alike(unequal: Sequence[str]) -> None:
    """Go on only where nothing differs.

    Raises:
        ValueError: something does.
    """
    if unequal:
        lines = "\n  ".join(unequal)
        raise ValueError(
            f"the models were not evaluated alike:\n  {lines}\nEvaluate them with equal settings, or pass "
            "--allow-differences for a report with this as a warning"
        )


def latency_differences(latencies: Mapping[str, Latency]) -> list[str]:
    """What must be equal for latencies to be comparable, and is not."""
    if not latencies:
        return []
    (first_name, first), *others = latencies.items()
    ours = asdict(first.settings) | first.hardware
    found = []
    for name, latency in others:
        theirs = asdict(latency.settings) | latency.hardware
        found += [
            f"latency, {key}: {first_name} has {_short(ours.get(key))}, {name} has {_short(theirs.get(key))}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
