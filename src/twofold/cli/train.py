"""`twofold train`: a recipe in, a trained checkpoint out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from twofold.cli.console import err, is_main, note, print_json
from twofold.cli.distill_targets import distill_targets
from twofold.config.recipe import Run
from twofold.posttrain.stages import read_run, stage_of, train_stage
from twofold.train import TrainResult, progress_for


def train_command(
    recipe: Annotated[Path, typer.Argument(help="YAML file that describes the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as steps=100 optimizer.learning_rate=1e-4.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object, as last line.")
    ] = False,
) -> None:
    """Train an encoder-decoder as a recipe says; Ctrl-C or SIGTERM saves and stops, --resume goes on.

    On several devices: torchrun --nproc-per-node 8 -m twofold.cli train RECIPE.
    """
    if stage_of(recipe, overrides or ()) == "distill-targets":
        distill_targets(recipe, overrides or (), json=json)
        return
    run = read_run(recipe, overrides or ())
    note(f"{run.stage} of {_model_name(run)} with {recipe}: {run.steps:,} steps of {run.describe_step()}")
    note(f"loading model and data; results go to {run.output}")
    result = train_stage(run, resume=resume, callbacks=[progress_for(err)] if is_main() else [])
    if result.is_finished:
        note(f"wrote {result.model_path} (the model) and {result.output / 'metrics.jsonl'}")
    else:
        note(f"stopped after step {result.step} of {run.steps}, saved {result.checkpoint}")
        note(f"go on with: {_resume_line(recipe, overrides or ())}")
    if json:
        print_json(_summary(result))


def _model_name(recipe: Run) -> str:
    adapt = recipe.model.adapt
    if adapt is None:
        return str(recipe.model.path)
    donors = (
        adapt.encoder if adapt.decoder is None else f"{adapt.encoder} (encoder) and {adapt.decoder} (decoder)"
    )
    return f"a pair made of {donors}"


def _resume_line(recipe: Path, overrides: Sequence[str]) -> str:
    command = ["twofold", "train"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        command = [
            "torchrun",
            "--nproc-per-node",
            os.environ["LOCAL_WORLD_SIZE"],
            "-m",
            "twofold.cli",
            "train",
        ]
    return shlex.join([*command, str(recipe), *overrides, "--resume"])


def _summary(result: TrainResult) -> dict[str, Any]:
    return {
        "finished": result.is_finished,
        "step": result.step,
        "loss": result.losses[-1] if result.losses else None,
        "best_step": result.best_step,
        "held_out_loss": result.held_out[-1][1] if result.held_out else None,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        "model": None if result.model_path is None else str(result.model_path),
        "checkpoint": str(result.checkpoint),
        "output": str(result.output),
    }
