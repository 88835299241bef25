"""What the parts of the study share: means with their noise, and one JSON file for each arm."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def noise(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    middle = mean(values)
    return (sum((x - middle) ** 2 for x in values) / (len(values) - 1) / len(values)) ** 0.5


def differences(ours: Sequence[float], donors: Sequence[float], file: Path) -> list[float]:
    """Ours less the donor's, for each thing that both were measured on.

    Raises:
        ValueError: `file`, where one of them lies, was measured with another number.
    """
    if len(ours) != len(donors):
        raise ValueError(
            f"{file} was measured on {len(ours)} pieces, the donor beside it on {len(donors)}, and differences are "
            "taken piece by piece; delete the file, or give the donor's number of pieces (--pieces, --examples)"
        )
    return [a - b for a, b in zip(ours, donors, strict=True)]


def details_of(file: Path) -> dict[str, Any] | None:
    """What was found for an arm; None where it has not been measured yet."""
    if not file.exists():
        return None
    details: dict[str, Any] = json.loads(file.read_text())["details"]
    return details


def rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in metrics.items()}


def slug(name: str) -> str:
    return name.replace(" ", "_").replace(".", "")


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(json.dumps(content) + "\n")
    partial_file.replace(file)


def show(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
