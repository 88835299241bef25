"""`twofold frontier`: several models in, quality against cost out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table

from twofold.cli.console import note, out, print_json
from twofold.cli.options import SkipVisionOption
from twofold.evaluate.bootstrap import Estimate
from twofold.evaluate.collect import Comparison, collect, is_evaluation, named_models
from twofold.evaluate.finding import finding
from twofold.evaluate.frontier import Frontier
from twofold.evaluate.latency import LatencySettings, Lengths
from twofold.evaluate.machine import command, versions
from twofold.evaluate.pictures import format_cost, format_count
from twofold.evaluate.report import write_report
from twofold.infer.backends import BACKENDS, PRECISIONS, BackendName, Precision


def frontier_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL...",
            help="Encoder-decoders and decoder-only models: folders, hub names, GGUF files; or files that "
            "`twofold eval` wrote (*.json).",
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; the same one goes on.")] = ...,  # type: ignore[assignment]
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated. Default: those that all evaluations have.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="A list of tasks in place of --tasks, see `twofold eval`.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(envvar="TWOFOLD_DATA", help="Folder of local task files.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first examples of each task alone.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Worked examples before each question; default: the task's own.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the models' chat templates.")] = False,
    baseline: Annotated[
        str | None,
        typer.Option(help="Model that the others are compared with. Default: the first decoder-only one."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help=f"Of evaluations, bytes and latency: {', '.join(PRECISIONS)}.")
    ] = "float32",
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(BACKENDS)}.")] = "auto",
    batch: Annotated[int, typer.Option(help="Rows decoded together, and those of the throughput.")] = 8,
    runs: Annotated[int, typer.Option(help="Measured of each latency; one more warms up.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Of the processor; default: all cores.")] = None,
    source_tokens: Annotated[
        int | None, typer.Option(help="Latency with this much read. Default: each task's own mean.")
    ] = None,
    target_tokens: Annotated[int | None, typer.Option(help="And this much written.")] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time the models.")] = True,
    allow_differences: Annotated[
        bool,
        typer.Option(
            "--allow-differences", help="Unequal settings become a warning in the report, not an error."
        ),
    ] = False,
    skip_vision: SkipVisionOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Evaluate and time again what the folder holds already.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object, as last line.")
    ] = False,
) -> None:
    """Draw quality against cost: a report (index.html), its numbers (frontier.json) and pictures (PNG, SVG).

    Models are evaluated where they come without an evaluation, and timed each in a process of its own. What is done is
    kept in the folder, so that an interrupted run goes on, and another model can be added later.
    """
    if (source_tokens is None) != (target_tokens is None):
        raise ValueError("--source-tokens and --target-tokens go together; give both, or none")
    for option, value in (("--source-tokens", source_tokens), ("--target-tokens", target_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    reference = None
    if source_tokens is not None and target_tokens is not None:
        reference = Lengths(source_tokens, target_tokens)
    named = named_models(models)
    comparison = Comparison(
        models=named,
        tasks=_tasks(tasks, suite, are_evaluated=all(is_evaluation(path) for path in named.values())),
        data=data,
        limit=limit,
        num_fewshot=num_fewshot,
        chat=chat,
        latency=LatencySettings(
            precision=cast(Precision, _chosen(precision, PRECISIONS, "--precision")),
            backend=cast(BackendName, _chosen(backend, BACKENDS, "--backend")),
            batch_size=batch,
            runs=runs,
            threads=threads,
        ),
        is_measured=measure,
        reference=reference,
        baseline=baseline,
        allows_differences=allow_differences,
        skip_vision=skip_vision,
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = collect(comparison, folder, force=force, say=note)
    files = write_report(found, folder, command=command(), versions=versions())
    show(found)
    note(finding(found))
    note(f"wrote {files[0]}")
    if json:
        print_json({"finding": finding(found), "report": str(files[0]), **found.as_json()})


def show(found: Frontier) -> None:
    """One row a model, best score first; * marks the line of best score per cost."""
    table = Table("model", "kind", "score", f"against {found.baseline}", "FLOPs per request", "latency")
    for entry in found.entries:
        flops = "-" if entry.flops is None else format_count(entry.flops)
        seconds = entry.latency_median_s
        latency = "-" if seconds is None else format_cost(seconds, "latency")
        table.add_row(
            entry.name,
            entry.kind,
            _with_interval(entry.score),
            "" if entry.difference is None else _with_interval(entry.difference, "+"),
            f"{flops}{' *' if entry.name in found.on_flops else ''}",
            f"{latency}{' *' if entry.name in found.on_latency else ''}",
        )
    out.print(table)


def _with_interval(estimate: Estimate, sign: str = "") -> str:
    value = f"{estimate.value:{sign}.1f}"
    return (
        value if estimate.low is None else f"{value} ({estimate.low:{sign}.1f} to {estimate.high:{sign}.1f})"
    )


def _tasks(tasks: str | None, suite: str | None, *, are_evaluated: bool) -> tuple[str, ...]:
    """A suite stands for its tasks where these were evaluated already, and else for itself, with its shots."""
    if tasks is not None and suite is not None:
        raise ValueError("--tasks and --suite both name tasks; give one of them")
    if suite is not None:
        from twofold.evaluate.tasks import SUITES

        name = _chosen(suite, (*SUITES, "local"), "--suite")
        return tuple(SUITES[name]) if are_evaluated and name in SUITES else (name,)
    return tuple(name.strip() for name in (tasks or "").split(",") if name.strip())


def _chosen(name: str, allowed: tuple[str, ...], option: str) -> str:
    if name.strip() not in allowed:
        raise ValueError(f"{option} takes {', '.join(allowed)}; got {name.strip()!r}")
    return name.strip()
