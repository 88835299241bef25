"""`twofold eval`: scores of a model on tasks, in a table and in the file that `twofold frontier` reads."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import typer
from rich.table import Table

from twofold.cli.console import note, out, print_json
from twofold.cli.options import SkipVisionOption
from twofold.evaluate import Evaluation, TaskResult, open_contender
from twofold.evaluate.run import evaluate
from twofold.infer.backends import BACKENDS, PRECISIONS, BackendName, Precision

SUITES = ("pt", "it", "superglue", "local")
"""Names that `twofold.evaluate.tasks` takes for several tasks."""


def eval_command(
    model: Annotated[
        str, typer.Argument(help="An encoder-decoder or a decoder-only model: folder, hub name or GGUF file.")
    ],
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated: names of the harness, or of local tasks.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="The T5Gemma paper's lists (pt, it, superglue), or all that the data folder has (local)."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="TWOFOLD_DATA", help="Folder of local data; tasks it has need no network."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first examples of each task: a trial.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Worked examples before each question; default: the task's own.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    count_stop: Annotated[
        bool,
        typer.Option(
            "--count-stop", help="The end token counts in likelihoods. The harness does not count it."
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(PRECISIONS)}. int8 and int4 are for answers; likelihoods are float32 then."
        ),
    ] = "float32",
    backend: Annotated[str, typer.Option(help=f"What writes answers: {', '.join(BACKENDS)}.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of the processor; default: all cores.")] = None,
    batch: Annotated[int, typer.Option(help="Answers that are written together.")] = 8,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps answers as they come; run again, an interrupted evaluation goes on."
        ),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Allow tasks that run programs the model wrote, on this machine."),
    ] = False,
    out_file: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file of results.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    name: Annotated[str | None, typer.Option(help="In tables; default: the last part of MODEL.")] = None,
    superglue: Annotated[
        bool,
        typer.Option(
            "--superglue",
            help="The paper's SuperGLUE score instead: all parameters tuned with a classification head, on each task "
            "or those of --tasks. Needs OUT.",
        ),
    ] = False,
    grid: Annotated[
        str | None,
        typer.Option(
            help="With --superglue: what is tried, such as 'lr=1e-5,3e-5 batch=16,32 dropout=0,0.1'. The best by dev "
            "accuracy counts."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="With --superglue: passes over the training examples; default: 5.")
    ] = None,
    limit_train: Annotated[
        int | None, typer.Option(help="With --superglue: training examples of each task.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --superglue: go on with the cells that OUT has.")
    ] = False,
    skip_vision: SkipVisionOption = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print everything but single examples as one JSON object, as last line."),
    ] = False,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness.

    Likelihoods (multiple choice, perplexity) come from the model in PyTorch; answers from the engine, with its backend
    and precision. The context goes to the encoder and the continuation to the decoder; decoder-only models are read as
    the harness reads them.
    """
    names = [part.strip() for part in (tasks or "").split(",") if part.strip()]
    if suite is not None:
        names.append(_chosen(suite, SUITES, "--suite"))
    if not names and not superglue:
        raise ValueError(f"no task: name some with --tasks, or a list with --suite ({', '.join(SUITES)})")
    if resume and not superglue:
        raise ValueError("--resume is for --superglue; an evaluation goes on by itself from its --cache")
    given = {"--grid": grid, "--epochs": epochs, "--limit-train": limit_train}
    if not superglue and (without_effect := [option for option, value in given.items() if value is not None]):
        raise ValueError(f"{', '.join(without_effect)} is for --superglue; leave it out")
    if superglue and out_file is None:
        raise ValueError("--superglue keeps finished cells beside its results; give it a file with --out")
    precision = _chosen(precision, PRECISIONS, "--precision")
    backend = _chosen(backend, BACKENDS, "--backend")
    if out_file is not None and out_file.exists() and not (force or resume):
        raise FileExistsError(f"{out_file} exists; choose another name, or replace it with --force")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    dtype = torch.bfloat16 if precision == "bfloat16" and not superglue else torch.float32
    contender = open_contender(model, name=name, dtype=dtype, skip_vision=skip_vision)
    note(f"evaluating {contender.name} ({contender.kind}) on {', '.join(names) or 'SuperGLUE'}")
    if superglue:
        from twofold.evaluate import superglue as protocol

        assert out_file is not None
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"--superglue tunes in float32 or bfloat16, got {precision!r}")
        result = protocol.run(
            contender,
            out=out_file,
            tasks=names or tuple(protocol.TASKS),
            data=data,
            grid=None if grid is None else protocol.Grid.parse(grid),
            tuning=protocol.Tuning(
                precision=cast(Literal["float32", "bfloat16"], precision),
                **({} if epochs is None else {"epochs": epochs}),
            ),
            limit_train=limit_train,
            limit_dev=limit,
            resume=resume,
            say=note,
        )
    else:
        result = evaluate(
            contender,
            names,
            data=data,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat,
            count_stop=count_stop,
            backend=cast(BackendName, backend),
            precision=cast(Precision, precision),
            threads=threads,
            batch_size=batch,
            cache=cache,
            run_code=run_code,
            show_progress=True,
        )
        if out_file is not None:
            result.save(out_file)
    show(result)
    if out_file is not None:
        note(f"written to {out_file}")
    if json:
        found = asdict(result)
        for task in found["tasks"].values():
            del task["values"]
        print_json(found)


def show(result: Evaluation) -> None:
    """A row for each task."""
    title = f"{result.model}: {result.parameters / 1e6:.0f}M parameters, {result.seconds:.0f} s"
    if result.settings.get("limit") is not None:
        title += f"; the first {result.settings['limit']} examples only"
    table = Table("task", "metric", "value", "examples", "truncated", title=title)
    for task in result.tasks.values():
        table.add_row(task.task, task.metric, _value(task), str(task.n), str(task.n_truncated))
    out.print(table)


def _value(task: TaskResult) -> str:
    digits = 4 if task.scale == 1 else 2
    error = "" if task.error is None else f" ± {task.error:.{digits}f}"
    return f"{task.value:.{digits}f}{error}"


def _chosen(name: str, allowed: tuple[str, ...], option: str) -> str:
    if name not in allowed:
        raise ValueError(f"{option} takes {', '.join(allowed)}; got {name!r}")
    return name
