"""`twofold merge`: a model and an adapter in, one model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofold.cli.console import note, print_json
from twofold.train.adapters import merge_adapter


def merge_command(
    base: Annotated[str, typer.Argument(help="Folder or hub name of the model the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter, in PEFT's format.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = ...,  # type: ignore[assignment]
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Add an adapter (LoRA, DoRA, any that PEFT merges) to the weights of its model."""
    merge_adapter(base, adapter, out, overwrite=overwrite)
    note(f"wrote {out}: {base} with the adapter {adapter}")
    if json:
        print_json({"out": str(out), "base": base, "adapter": str(adapter)})
