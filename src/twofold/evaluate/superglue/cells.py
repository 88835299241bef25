"""The grid, its cells, and the file in which finished cells wait for the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

_KEYS = {"lr": "learning_rates", "batch": "batch_sizes", "dropout": "dropout_rates"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What is tried on every task: each learning rate with each batch size and dropout rate."""

    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    batch_sizes: tuple[int, ...] = (16, 32)
    dropout_rates: tuple[float, ...] = (0.0, 0.1)
    """Of the classification head."""

    def __post_init__(self) -> None:
        for name, values, is_allowed in (
            ("learning_rates", self.learning_rates, lambda rate: 0 < rate < 1),
            ("batch_sizes", self.batch_sizes, lambda size: size >= 1 and size == int(size)),
            ("dropout_rates", self.dropout_rates, lambda rate: 0 <= rate < 1),
        ):
            if not values or not all(map(is_allowed, values)) or len(set(values)) < len(values):
                raise ValueError(
                    f"{name} needs at least one value and none twice, learning rates above 0 and below 1, whole batch "
                    f"sizes from 1, dropout rates from 0 and below 1; got {values}"
                )

    @classmethod
    def parse(cls, text: str) -> Grid:
        """A grid as text, such as "lr=1e-5,3e-5 batch=16 dropout=0,0.1"; what is not named keeps its default.

        Raises:
            ValueError: an unknown or repeated name, or values that a grid does not take.
        """
        found: dict[str, tuple[Any, ...]] = {}
        for part in text.split():
            name, equals, values = part.partition("=")
            key = _KEYS.get(name)
            if key is None or not equals or key in found:
                raise ValueError(
                    f"a grid looks like 'lr=1e-5,3e-5 batch=16,32 dropout=0,0.1', each name at most once; got {part!r}"
                )
            kind = int if name == "batch" else float
            try:
                found[key] = tuple(kind(value) for value in values.split(","))
            except ValueError as error:
                raise ValueError(f"a grid takes numbers with commas between them, got {part!r}") from error
        return cls(**found)

    @property
    def points(self) -> Iterator[tuple[float, int, float]]:
        """Learning rate, batch size and dropout rate of each cell, in order."""
        return product(self.learning_rates, self.batch_sizes, self.dropout_rates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of the grid on one task."""

    task: str
    learning_rate: float
    batch_size: int
    dropout_rate: float
    answers: tuple[int, ...] = ()
    """Label index for each dev example."""
    accuracy: float | None = None
    """Of these; None: it failed."""
    first_loss: float | None = None
    """Nats per example, of the first batch before the first update."""
    last_loss: float | None = None
    """Of the last batch before the last update."""
    steps: int = 0
    seconds: float = 0.0
    step_s: float = 0.0
    """Seconds per optimizer step, mean."""
    failure: str | None = None
    """Why there are no answers: training left the finite numbers."""

    @property
    def point(self) -> tuple[str, float, int, float]:
        """Which cell it is."""
        return self.task, self.learning_rate, self.batch_size, self.dropout_rate

    def __str__(self) -> str:
        point = (
            f"{self.task}, lr {self.learning_rate:g}, batch {self.batch_size}, dropout {self.dropout_rate:g}"
        )
        if self.accuracy is None:
            return f"{point}: {self.failure}"
        return f"{point}: accuracy {self.accuracy:.3f}, {self.steps} steps in {self.seconds:.0f} s"

    def summary(self) -> dict[str, Any]:
        """Everything but the answers and the task's name, for a report."""
        return {name: value for name, value in asdict(self).items() if name not in ("answers", "task")}


class CellFile:
    """Finished cells on disk, as one JSON object that is replaced whole after each.

    Args:
        path: of the file, which is gone on with where it is there. Its folder is made where it is missing.
        settings: JSON-able, what all cells depend on.
        tasks: JSON-able, what a task's cells depend on beside that, by its name. Others in the file are kept.

    Attributes:
        found: cells that are finished, by `Cell.point`.

    Raises:
        ValueError: the file is there, but was begun with other settings, or is something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(dict(settings)))
        self._tasks = json.loads(json.dumps(dict(tasks)))
        self.found: dict[tuple[str, float, int, float], Cell] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            before, tasks_before = dict(content["settings"]), dict(content["tasks"])
            cells = [Cell(**{**cell, "answers": tuple(cell["answers"])}) for cell in content["cells"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} does not hold cells of SuperGLUE ({error}); choose another name"
            ) from error
        changes = _changes(before, self._settings)
        for name, now in self._tasks.items():
            if name in tasks_before:
                changes += [f"{name}: {one}" for one in _changes(tasks_before[name], now)]
        if changes:
            raise ValueError(
                f"{path} was begun with other settings: {'; '.join(changes)}. Resume with the same, or choose another "
                "name"
            )
        self._tasks = tasks_before | self._tasks
        self.found = {cell.point: cell for cell in cells}

    def add(self, cell: Cell) -> None:
        """Take in a cell, which is in the file on return."""
        self.found[cell.point] = cell
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        cells = [asdict(one) for one in self.found.values()]
        content = {"settings": self._settings, "tasks": self._tasks, "cells": cells}
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
        part.replace(self._path)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names]
