"""Options that several commands have, each with its type and help."""

from __future__ import annotations

from typing import Annotated

import typer

from twofold.infer.backends import BACKENDS, PRECISIONS

BackendOption = Annotated[str, typer.Option(help=f"What runs the model: {', '.join(BACKENDS)}.")]
PrecisionOption = Annotated[
    str | None, typer.Option(help=f"{', '.join(PRECISIONS)}; the model's own if not given.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Of the processor; one for each core.")]
BatchSizeOption = Annotated[int, typer.Option(help="Answers that are written together.")]
SkipVisionOption = Annotated[bool, typer.Option(help="T5Gemma 2: load without its vision tower.")]
