"""`twofold export`: a model in, files for another program out, compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofold.checkpoint.load import load
from twofold.cli.console import note, print_json
from twofold.cli.options import SkipVisionOption
from twofold.export import TARGETS, export

_TARGETS_HELP = "; ".join(f"{name}: {target.description}" for name, target in TARGETS.items()) + "."


def export_command(
    model: Annotated[str, typer.Argument(help="An encoder-decoder: folder or hub name.")],
    to: Annotated[str, typer.Option("--to", help=_TARGETS_HELP)] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = ...,  # type: ignore[assignment]
    quantization: Annotated[
        str | None,
        typer.Option(help="How weights are stored. ctranslate2: int8, float16...; openvino: int8 or int4."),
    ] = None,
    skip_vision: SkipVisionOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Write a model for another program. Nothing is written that does not compute what the model computes."""
    exported = export(load(model, skip_vision=skip_vision), out, to=to, quantization=quantization)
    note(
        f"wrote {out} ({to}); {exported.tokens_compared} tokens' log-probabilities are within "
        f"{exported.difference:.1e} nats of the model's in float32"
    )
    if exported.difference_rounded is not None:
        note(f"with weights rounded to {quantization} within {exported.difference_rounded:.1e}")
    if json:
        print_json(
            {
                "out": str(out),
                "to": to,
                "quantization": quantization,
                "difference": exported.difference,
                "difference_rounded": exported.difference_rounded,
                "tokens_compared": exported.tokens_compared,
            }
        )
