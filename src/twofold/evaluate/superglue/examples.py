"""Tasks made ready for one model: drawn, encoded, and described, so that a result says what it is of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twofold.evaluate.superglue.data import Missing, Source, Splits
from twofold.evaluate.superglue.reader import Encoded, Reader
from twofold.evaluate.superglue.tasks import TASKS, Task

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


def prepare(
    tasks: Sequence[str],
    data: Path | None,
    reader: Reader,
    *,
    limit_train: int | None,
    limit_dev: int | None,
    seed: int,
    say: Say,
) -> tuple[list[Ready], dict[str, str]]:
    """The tasks that can run, in their order, and why the others cannot. Arguments and errors as of `superglue.run`."""
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"SuperGLUE's tasks are {', '.join(TASKS)}; got {', '.join(unknown) or 'none'}")
    for name, value in (("limit_train", limit_train), ("limit_dev", limit_dev)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {value}")
    source = Source(data)
    ready: list[Ready] = []
    skipped: dict[str, str] = {}
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
    return ready, skipped


def seed_of(seed: int, task: str) -> int:
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
        drawn = np.random.default_rng(seed_of(seed, task.name)).permutation(len(train))[:limit_train]
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
