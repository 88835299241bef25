"""Everything a frontier needs, kept in one folder: evaluations and costs that are there are used, the rest is made.

OUT/comparison.json     what was asked for; only what fits it goes on in a folder
OUT/evaluations/NAME.json, OUT/costs/NAME.json
OUT/answers/            of evaluations that were interrupted
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from twofold.evaluate.comparable import demand_alike, differences, shared_tasks
from twofold.evaluate.contender import contender_config, open_contender
from twofold.evaluate.cost import Cost
from twofold.evaluate.frontier import Frontier, frontier, reference_lengths, wanted_timings
from twofold.evaluate.latency import Latency, LatencySettings, Lengths, measure_latency
from twofold.evaluate.machine import command
from twofold.evaluate.results import Evaluation
from twofold.infer.backends import Precision
from twofold.infer.bench import EndedError

Say = Callable[[str], None]

_KEPT = ("evaluations", "costs")
"""Folders with one file for each model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What is to be compared, and how.

    Raises:
        ValueError: no models, a name that cannot be a file's, or a baseline that is none of them.
    """

    models: Mapping[str, str]
    """By name: a model for `open_contender`, or the file of an evaluation (`*.json`)."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups and suites that models are evaluated on; where there are evaluations only, those of them that are
    compared. Empty: all that the evaluations share."""
    data: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    latency: LatencySettings = field(default_factory=LatencySettings)
    """Its precision and batch size are those of the evaluations too."""
    is_measured: bool = True
    reference: Lengths | None = None
    """Latencies at these lengths, not at those of the tasks."""
    baseline: str | None = None
    allows_differences: bool = False
    skip_vision: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("no models given; name at least one model folder or evaluation file")
        for name in self.models:
            if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
                raise ValueError(
                    f"{name!r} cannot name a model; use letters, digits, '-', '_', '+' and '.': NAME=PATH"
                )
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(
                f"no model is named {self.baseline!r}; the baseline is one of {', '.join(self.models)}"
            )

    @property
    def precision(self) -> Precision:
        return self.latency.precision

    def settings(self) -> dict[str, Any]:
        """What evaluations and costs that are kept depend on."""
        return {
            "tasks": list(self.tasks),
            "data": None if self.data is None else str(self.data),
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "chat": self.chat,
            **asdict(self.latency),
        }


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Paths by name.

    Args:
        given: `NAME=PATH` or `PATH`, whose name is then its last part, or the one in an evaluation's file.

    Raises:
        ValueError: two of one name, or an evaluation file that is none.
        FileNotFoundError: no such evaluation file.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = "", text
        if not name:
            last = Path(path).name
            name = Evaluation.load(Path(path)).model if is_evaluation(path) else last.removesuffix(".gguf")
        if name in found:
            raise ValueError(f"{found[name]} and {path} are both named {name!r}; name them apart: NAME=PATH")
        found[name] = path
    return found


def is_evaluation(path: str) -> bool:
    """The file of an evaluation, by its ending."""
    return path.endswith(".json")


def collect(
    comparison: Comparison, folder: Path, *, force: bool = False, say: Say = lambda text: None
) -> Frontier:
    """Evaluate and time what is not there yet, and bring everything together.

    Args:
        comparison: what to compare.
        folder: where evaluations and costs are kept. One that was used with the same settings is gone on with; models
            may come in addition.
        force: evaluate and time every model again, whatever the folder holds.
        say: told what is going on.

    Raises:
        FileExistsError: the folder holds another comparison, or something else.
        ValueError, FileNotFoundError: a model that cannot be had or timed, or evaluations that do not go together.
        ImportError: the extra `eval` is missing where something is to be evaluated.
    """
    _claim(comparison, folder, force)
    evaluations = [
        _evaluation(name, path, comparison, folder, say) for name, path in comparison.models.items()
    ]
    are_all_given = all(is_evaluation(path) for path in comparison.models.values())
    tasks = shared_tasks(evaluations, comparison.tasks if are_all_given and comparison.tasks else None)
    if not comparison.allows_differences:
        demand_alike(differences(evaluations, tasks))
    costs = {
        evaluation.model: cost
        for evaluation in evaluations
        if (cost := _cost(evaluation, comparison, folder, say)) is not None
    }
    if comparison.is_measured:
        reference = comparison.reference or reference_lengths(evaluations, tasks, costs.values())
        for evaluation in evaluations:
            wanted = wanted_timings(
                evaluation,
                tasks,
                reference,
                comparison.latency.batch_size,
                at_reference=comparison.reference is not None,
            )
            name = evaluation.model
            costs[name] = _timed(name, costs[name], wanted, comparison, folder, say)
    return frontier(
        evaluations,
        costs,
        tasks=tasks,
        baseline=comparison.baseline,
        precision=comparison.precision,
        reference=comparison.reference,
        allows_differences=comparison.allows_differences,
    )


def _claim(comparison: Comparison, folder: Path, force: bool) -> None:
    """See that the folder may be used, and note what for. What it keeps of models that were not asked for is not
    trusted: it may be from before a `force`."""
    file = folder / "comparison.json"
    models = dict(comparison.models)
    settings = comparison.settings()
    known: dict[str, str] = {}
    if not force and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        unequal = [
            f"{key} was {before['settings'].get(key)}, now {value}"
            for key, value in settings.items()
            if before["settings"].get(key) != value
        ]
        unequal += [
            f"{name} was {path}, now {models[name]}"
            for name, path in before["models"].items()
            if models.get(name, path) != path
        ]
        is_used = any((folder / part).exists() for part in _KEPT)
        if unequal and is_used:
            raise FileExistsError(
                f"{folder} holds another comparison: {'; '.join(unequal)}. Give another folder, or --force to begin "
                "anew"
            )
        known = before["models"] if is_used else {}
    elif not force and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty and holds no comparison; give another folder, or --force to write into this one"
        )
    for name in models.keys() - known.keys():
        for part in _KEPT:
            (folder / part / f"{name}.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"settings": settings, "models": known | models}
    file.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def _evaluation(name: str, path: str, comparison: Comparison, folder: Path, say: Say) -> Evaluation:
    if is_evaluation(path):
        return replace(Evaluation.load(Path(path)), model=name)
    kept = folder / "evaluations" / f"{name}.json"
    if kept.exists():
        say(f"{name}: evaluated before, {kept}")
        return Evaluation.load(kept)
    if not comparison.tasks:
        raise ValueError(f"{name} is to be evaluated, on no task; name some with --tasks or --suite")
    from twofold.evaluate.run import evaluate

    # In int8 and int4 the engine writes, and likelihoods are the model's own.
    dtype = torch.bfloat16 if comparison.precision == "bfloat16" else torch.float32
    say(f"{name}: evaluating on {', '.join(comparison.tasks)}")
    found = evaluate(
        open_contender(path, name=name, dtype=dtype, skip_vision=comparison.skip_vision),
        comparison.tasks,
        data=comparison.data,
        limit=comparison.limit,
        num_fewshot=comparison.num_fewshot,
        chat=comparison.chat,
        backend=comparison.latency.backend,
        precision=comparison.precision,
        threads=comparison.latency.threads,
        batch_size=comparison.latency.batch_size,
        cache=folder / "answers",
        command=command(),
        show_progress=True,
    )
    found.save(kept)
    return found


def _cost(evaluation: Evaluation, comparison: Comparison, folder: Path, say: Say) -> Cost | None:
    """What is kept, or the model's shapes; None where these are not to be had and nothing is measured."""
    name = evaluation.model
    kept = folder / "costs" / f"{name}.json"
    if kept.exists():
        cost = Cost.load(kept)
        if cost.path == evaluation.path:
            return cost
    try:
        cost = Cost(path=evaluation.path, config=contender_config(evaluation.path))
    except (ValueError, OSError) as error:
        if comparison.is_measured:
            raise ValueError(
                f"{name}: its model {evaluation.path} cannot be opened to be timed ({error}); put it there, or pass "
                "--no-measure"
            ) from error
        say(f"{name}: no costs, its model {evaluation.path} cannot be opened ({error})")
        return None
    cost.save(kept)
    return cost


def _timed(
    name: str,
    cost: Cost,
    wanted: Sequence[tuple[Lengths, int]],
    comparison: Comparison,
    folder: Path,
    say: Say,
) -> Cost:
    """With every latency that is wanted; those that are not kept are measured, and kept."""
    before = cost.latency
    missing = list(wanted) if before is None else before.missing(wanted)
    if not missing:
        return cost
    say(f"{name}: timing {len({lengths for lengths, _ in missing})} pairs of lengths")
    try:
        found = measure_latency(cost.path, comparison.latency, missing, skip_vision=comparison.skip_vision)
    except EndedError as error:
        raise ValueError(
            f"{name} could not be timed: {error}; lower --batch, or pass --no-measure"
        ) from error
    timed = replace(cost, latency=found if before is None else _joined(name, before, found))
    timed.save(folder / "costs" / f"{name}.json")
    return timed


def _joined(name: str, before: Latency, found: Latency) -> Latency:
    if (before.settings, before.hardware) != (found.settings, found.hardware):
        raise ValueError(
            f"{name} was timed before with {before.settings} on {before.hardware}, now with {found.settings} on "
            f"{found.hardware}; pass --force to time everything again"
        )
    return before.also(found)
