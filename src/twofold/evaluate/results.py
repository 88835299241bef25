"""The file that an evaluation leaves, which `twofold frontier` reads."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twofold.evaluate.contender import Kind

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """One task's score, and what it is made of."""

    task: str
    metric: str
    """The one that stands for the task: `acc_norm`, `exact_match`, `rougeL`, ..."""
    value: float
    """In the metric's own scale."""
    error: float | None
    """Its standard error over examples; None where the metric is not a mean (BLEU)."""
    n: int
    """Examples."""
    scale: float = 1.0
    """The metric's best value: 1, or 100 for ROUGE, BLEU and chrF; of no meaning where less is better."""
    higher_is_better: bool = True
    """False: a perplexity, or bits."""
    values: tuple[float, ...] = ()
    """Of each example, in the task's order; empty where the metric is not a mean."""
    others: dict[str, float] = field(default_factory=dict)
    """Other metrics of the same answers."""
    n_truncated: int = 0
    """Examples of which the model could not read everything."""
    source_tokens: float = 0.0
    """Read by the encoder (by the prompt, for decoder-only models), mean over requests."""
    target_tokens: float = 0.0
    """Scored or written, mean over requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """All tasks of one model."""

    model: str
    """Its name in tables."""
    path: str
    kind: Kind
    parameters: int
    tasks: dict[str, TaskResult]
    settings: dict[str, Any]
    """Shots, limits, template, precision, data: whatever changes a score."""
    versions: dict[str, str]
    hardware: dict[str, Any]
    command: str
    date: str
    seconds: float

    def save(self, file: Path) -> None:
        """Write as JSON, whole or not at all; an older file of this name is replaced."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        part.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            ValueError: not such a file.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            given = found.pop("format", None)
            if given != FORMAT:
                raise ValueError(f"its format is {given!r}, this version reads {FORMAT}")
            tasks = {
                name: TaskResult(**{**task, "values": tuple(task["values"])})
                for name, task in found.pop("tasks").items()
            }
            return cls(tasks=tasks, **found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not an evaluation of `twofold eval`: {error}") from error
