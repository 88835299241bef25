"""The paper's SuperGLUE score (arXiv 2504.06225, section 4) of one model: all tasks, all cells, the best of each."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from twofold.evaluate.contender import Contender, open_contender
from twofold.evaluate.results import Evaluation, TaskResult
from twofold.evaluate.superglue.cells import Cell, CellFile, Grid
from twofold.evaluate.superglue.data import Missing, Source, Splits
from twofold.evaluate.superglue.tasks import TASKS, Task
from twofold.evaluate.superglue.tune import Encoded, Reader, Tuning, tune
from twofold.infer.journal import fingerprint, refuse_existing
from twofold.models import EncoderDecoder
from twofold.train.step import NonFiniteError

PREFIX = "superglue_"
"""Before a task's name in results, so that a tuned score does not pass for one without training."""

PROTOCOL = (
    "classification head on the last encoder token (decoder-only: the last token), all parameters tuned, the best cell "
    "of the grid by dev accuracy (arXiv 2504.06225, section 4); dropout is the head's"
)
SELECTION = (
    "The cell is chosen on the dev set that gives the score. That is the paper's protocol, and optimistic, the more so "
    "the larger the grid and the smaller the dev set: compare only scores of equal grids."
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ready:
    """A task that can run."""

    task: Task
    train: tuple[Encoded, ...]
    dev: tuple[Encoded, ...]
    origin: str
    n_shared: int
    """See `Splits`."""

    def describe(self) -> dict[str, Any]:
        """What its cells depend on, JSON-able."""
        digest = hashlib.sha256(repr((self.train, self.dev)).encode()).hexdigest()[:16]
        counts = Counter(one.label for one in self.train)
        return {
            "labels": list(self.task.labels),
            "logits": "one for each alternative" if self.task.is_choice else "one for each label",
            "data": self.origin,
            "examples": digest,
            "n_train": len(self.train),
            "n_dev": len(self.dev),
            "n_train_of_label": [counts[i] for i in range(len(self.task.labels))],
            "n_train_truncated": sum(one.is_truncated for one in self.train),
            "n_dev_truncated": sum(one.is_truncated for one in self.dev),
            "n_train_left_out_for_dev": self.n_shared,
        }


def run(
    contender: Contender | str | Path,
    *,
    out: Path,
    tasks: Sequence[str] = tuple(TASKS),
    data: Path | None = None,
    grid: Grid | None = None,
    tuning: Tuning | None = None,
    limit_train: int | None = None,
    limit_dev: int | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str | torch.device | None = None,
    say: Say = lambda _: None,
) -> Evaluation:
    """Tune a model on each task with each cell of a grid, and score the best cell on the dev set.

    Finished cells are kept in `OUT.cells.json`, so that an interrupted run goes on with the next one and gives the same
    result; a cell that was cut off starts anew. Tasks without data are left out with the reason
    (`settings["skipped"]`), and the mean says which tasks it is over.

    Args:
        contender: an open one, in float32, whose weights are afterwards what they were; or what `open_contender` takes.
        out: file of the results.
        tasks: names of `TASKS`.
        data: see `Source`.
        grid: default: `Grid()`.
        tuning: default: `Tuning()`.
        limit_train: examples, drawn with `seed`; None: all.
        limit_dev: examples, the first; None: all.
        seed: of heads, orders and dropout; the same for all cells of a task.
        resume: go on with the cells of `out`, and replace `out`. The grid may be another one.
        device: default: CUDA where there is one, else the CPU.
        say: hears of every task and cell.

    Returns:
        What was written to `out`. Tasks have the prefix "superglue_" and the metric "acc"; `others` has "majority", the
        accuracy of the dev set's most frequent label. `settings` has "mean_accuracy" with "mean_over", every cell, and
        what was left out.

    Raises:
        FileExistsError: `out` or its cells are there, and `resume` is off.
        FileNotFoundError: `data` is not there.
        ImportError: the hub is needed, and `datasets` is not installed.
        ValueError: an unknown task, data that cannot be used, no task with data, a model without tokenizer or not in
            float32, cells of other settings, or a task of which no cell stayed finite.
    """
    grid, tuning = grid or Grid(), tuning or Tuning()
    _check(tasks, limit_train, limit_dev)
    cells_file = out.with_name(out.name.removesuffix(".json") + ".cells.json")
    if not resume:
        refuse_existing(out)
        refuse_existing(cells_file)
    source = Source(data)
    if not isinstance(contender, Contender):
        contender = open_contender(contender)
    model, place = contender.model, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reader = Reader(model, tuning.max_tokens)
    tuning = replace(tuning, max_tokens=reader.max_tokens)

    ready, skipped = [], {}
    for name in dict.fromkeys(tasks):
        try:
            splits = source.splits(name)
        except Missing as error:
            skipped[name] = str(error)
            say(f"{name}: left out, {error}")
        else:
            ready.append(_ready(TASKS[name], splits, reader, limit_train, limit_dev, seed))
    if not ready:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"there is no task to run ({reasons}); give a folder with the files, see `superglue.data`"
        )

    settings: dict[str, Any] = {
        "suite": "superglue",
        "protocol": PROTOCOL,
        "selection": SELECTION,
        "tuning": asdict(tuning),
        "limit_train": limit_train,
        "limit_dev": limit_dev,
        "seed": seed,
    }
    examples = {one.task.name: one.describe() for one in ready}
    depends_on = {
        **settings, "model": fingerprint(model), "device": place.type,
        **{f"examples of {name}": found for name, found in examples.items()},
    }  # fmt: skip
    cells = CellFile(cells_file, depends_on, resume=resume)
    _fill(cells, model, ready, grid, tuning, seed=seed, place=place, say=say)

    of_task = {one.task.name: [cells.found[one.task.name, *point] for point in grid.points] for one in ready}
    best = {name: best_of(found) for name, found in of_task.items()}
    results = {PREFIX + one.task.name: score(one, best[one.task.name]) for one in ready}
    evaluation = Evaluation(
        model=contender.name,
        path=contender.path,
        kind=contender.kind,
        parameters=sum(p.numel() for p in model.parameters()),
        tasks=results,
        settings=settings
        | {
            "tuned_parameters": sum(p.numel() for p in model.encoder.parameters()),
            "examples": examples,
            "skipped": skipped,
            "grid": {name: list(values) for name, values in asdict(grid).items()},
            "cells": {name: [cell.summary() for cell in found] for name, found in of_task.items()},
            "best": {name: cell.summary() for name, cell in best.items()},
            "mean_accuracy": fmean(result.value for result in results.values()),
            "mean_over": [one.task.name for one in ready],
        },
        versions={name: version(name) for name in ("twofold", "torch", "transformers")},
        hardware=_hardware(place),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        seconds=sum(cell.seconds for found in of_task.values() for cell in found),
    )
    evaluation.save(out)
    return evaluation


def best_of(cells: Sequence[Cell]) -> Cell:
    """The cell with the highest dev accuracy, the first of equals.

    Raises:
        ValueError: none has one.
    """
    finished = [(cell.accuracy, cell) for cell in cells if cell.accuracy is not None]
    if not finished:
        reasons = "; ".join(map(str, cells))
        raise ValueError(
            f"no cell of {cells[0].task} stayed finite ({reasons}); resume with a grid of lower learning rates"
        )
    return max(finished, key=lambda found: found[0])[1]


def score(ready: Ready, cell: Cell) -> TaskResult:
    """A cell as the task's result."""
    correct = _correct(ready, cell.answers)
    texts = [ids for one in ready.dev for ids in one.texts]
    most_frequent = max(Counter(one.label for one in ready.dev).values())
    return TaskResult(
        task=PREFIX + ready.task.name,
        metric="acc",
        value=fmean(correct),
        error=stdev(correct) / len(correct) ** 0.5 if len(correct) > 1 else None,
        n=len(correct),
        values=tuple(correct),
        others={"majority": most_frequent / len(correct)},
        n_truncated=sum(one.is_truncated for one in ready.dev),
        source_tokens=fmean(map(len, texts)),
    )


def _check(tasks: Sequence[str], limit_train: int | None, limit_dev: int | None) -> None:
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"SuperGLUE's tasks are {', '.join(TASKS)}; got {', '.join(unknown) or 'none'}")
    for name, value in (("limit_train", limit_train), ("limit_dev", limit_dev)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {value}")


def _seed_of(seed: int, task: str) -> int:
    """63 bits for a task, whichever others run."""
    return int(np.random.SeedSequence((seed, *task.encode())).generate_state(1, np.uint64)[0] >> 1)


def _ready(
    task: Task, splits: Splits, reader: Reader, limit_train: int | None, limit_dev: int | None, seed: int
) -> Ready:
    """Draw, cut and encode.

    Raises:
        ValueError: a label without training example, or a text that cannot be cut.
    """
    train = splits.train
    if limit_train is not None and limit_train < len(train):
        drawn = np.random.default_rng(_seed_of(seed, task.name)).permutation(len(train))[:limit_train]
        train = tuple(train[i] for i in sorted(drawn.tolist()))
    absent = set(range(len(task.labels))) - {example.label for example in train}
    if absent:
        raise ValueError(
            f"{splits.origin}: none of the {len(train)} training examples of {task.name} has the label "
            f"{' or '.join(task.labels[i] for i in sorted(absent))}; raise limit_train, or complete the data"
        )
    return Ready(
        task,
        tuple(map(reader.encode, train)),
        tuple(map(reader.encode, splits.dev[:limit_dev])),
        splits.origin,
        splits.n_shared,
    )


def _fill(
    cells: CellFile,
    model: EncoderDecoder,
    ready: Sequence[Ready],
    grid: Grid,
    tuning: Tuning,
    *,
    seed: int,
    place: torch.device,
    say: Say,
) -> None:
    """Run the cells that are not there yet, each from the weights that the model comes with, which it gets back."""
    encoder = model.encoder
    home = encoder.embed_tokens.weight.device
    base = {name: tensor.detach().to("cpu", copy=True) for name, tensor in encoder.state_dict().items()}
    encoder.to(place)
    try:
        for one in ready:
            for point in grid.points:
                if (one.task.name, *point) in cells.found:
                    continue
                encoder.load_state_dict(base)
                cells.add(_cell(model, one, point, tuning, seed=_seed_of(seed, one.task.name)))
                say(str(cells.found[one.task.name, *point]))
    finally:
        encoder.load_state_dict(base)
        encoder.zero_grad(set_to_none=True)
        encoder.to(home).eval()


def _cell(
    model: EncoderDecoder, one: Ready, point: tuple[float, int, float], tuning: Tuning, *, seed: int
) -> Cell:
    learning_rate, batch_size, dropout_rate = point
    cell = Cell(
        task=one.task.name, learning_rate=learning_rate, batch_size=batch_size, dropout_rate=dropout_rate
    )
    try:
        tuned = tune(
            model,
            one.task,
            one.train,
            one.dev,
            learning_rate=learning_rate,
            batch_size=batch_size,
            dropout_rate=dropout_rate,
            tuning=tuning,
            seed=seed,
        )
    except NonFiniteError as error:
        return replace(cell, failure=str(error))
    accuracy = fmean(_correct(one, tuned.answers))
    return replace(cell, accuracy=accuracy, **asdict(tuned))


def _correct(ready: Ready, answers: Sequence[int]) -> list[float]:
    """1 for each dev example that was answered with its label, else 0."""
    return [float(answer == one.label) for answer, one in zip(answers, ready.dev, strict=True)]


def _hardware(place: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": place.type,
    }
    return found | ({"gpu": torch.cuda.get_device_name(place)} if place.type == "cuda" else {})
