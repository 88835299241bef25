"""The paper's SuperGLUE score (arXiv 2504.06225, section 4) of one model: all tasks, all cells, the best of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from twofold.evaluate import machine
from twofold.evaluate.contender import Contender, open_contender
from twofold.evaluate.results import Evaluation, TaskResult
from twofold.evaluate.superglue.cells import Cell, CellFile, Grid
from twofold.evaluate.superglue.examples import Ready, Say, prepare, seed_of
from twofold.evaluate.superglue.reader import Reader
from twofold.evaluate.superglue.tasks import TASKS
from twofold.evaluate.superglue.tune import Tuning, tune
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
        resume: go on with the cells of `out`, and replace `out`. Tasks and grid may be others.
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
    cells_file = out.with_name(out.name.removesuffix(".json") + ".cells.json")
    if not resume:
        refuse_existing(out)
        refuse_existing(cells_file)
    if not isinstance(contender, Contender):
        contender = open_contender(contender)
    model, place = contender.model, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reader = Reader(model, tuning.max_tokens)
    tuning = replace(tuning, max_tokens=reader.max_tokens)
    ready, skipped = prepare(
        tasks, data, reader, limit_train=limit_train, limit_dev=limit_dev, seed=seed, say=say
    )

    settings: dict[str, Any] = {"tuning": asdict(tuning), "seed": seed}
    examples = {one.task.name: one.describe() for one in ready}
    depends_on = settings | {"model": fingerprint(model), "device": place.type}
    cells = CellFile(cells_file, depends_on, examples)
    _fill(cells, model, ready, grid, tuning, seed=seed, place=place, say=say)

    settings |= {
        "suite": "superglue",
        "protocol": PROTOCOL,
        "selection": SELECTION,
        "tuned_parameters": sum(p.numel() for p in model.encoder.parameters()),
        "limit_train": limit_train,
        "limit_dev": limit_dev,
        "examples": examples,
        "skipped": skipped,
        "grid": {name: list(values) for name, values in asdict(grid).items()},
    }
    evaluation = _evaluation(contender, cells, ready, grid, settings, place)
    evaluation.save(out)
    return evaluation


def _evaluation(
    contender: Contender,
    cells: CellFile,
    ready: Sequence[Ready],
    grid: Grid,
    settings: dict[str, Any],
    place: torch.device,
) -> Evaluation:
    """The best cell of each task as its result, and all of them in the settings."""
    of_task = {one.task.name: [cells.found[one.task.name, *point] for point in grid.points] for one in ready}
    best = {name: best_of(found) for name, found in of_task.items()}
    results = {PREFIX + one.task.name: score(one, best[one.task.name]) for one in ready}
    return Evaluation(
        model=contender.name,
        path=contender.path,
        kind=contender.kind,
        parameters=sum(p.numel() for p in contender.model.parameters()),
        tasks=results,
        settings=settings
        | {
            "cells": {name: [cell.summary() for cell in found] for name, found in of_task.items()},
            "best": {name: cell.summary() for name, cell in best.items()},
            "mean_accuracy": fmean(result.value for result in results.values()),
            "mean_over": list(best),
        },
        versions=machine.versions(),
        hardware=machine.hardware(place),
        command=machine.command(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=sum(cell.seconds for found in of_task.values() for cell in found),
    )


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
                cells.add(_cell(model, one, point, tuning, seed=seed_of(seed, one.task.name)))
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
