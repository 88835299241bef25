"""`twofold average`: several checkpoints of one model in, their mean out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from twofold.cli.console import err, note, print_json
from twofold.train.averaging import average_checkpoints


def average_command(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Folders or hub names of one model's checkpoints.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = ...,  # type: ignore[assignment]
    weights: Annotated[
        str | None, typer.Option(help="One number for each checkpoint, such as 1,2,4; default equal.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Average the weights of several checkpoints of one model, tensor by tensor, in float32."""
    average_checkpoints(
        checkpoints, out, weights=_numbers(weights), overwrite=overwrite, watch=_with_progress
    )
    note(f"wrote {out}, the mean of {len(checkpoints)} checkpoints")
    if json:
        print_json({"out": str(out), "checkpoints": checkpoints, "weights": _numbers(weights)})


def _with_progress(names: Iterable[str], total: int) -> Iterable[str]:
    return track(names, description=f"{total} tensors", total=total, console=err, transient=True)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--weights takes numbers separated by commas, such as 1,2,4, got {text!r}"
        ) from None
