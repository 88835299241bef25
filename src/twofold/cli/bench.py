"""`twofold bench`: how fast a model answers on this machine, in what memory, and what lower precision costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.progress import track
from rich.table import Table

from twofold.cli.console import err, note, out, print_json
from twofold.cli.options import SkipVisionOption
from twofold.infer.backends import BACKENDS, PRECISIONS, BackendName, Precision
from twofold.infer.bench import BatchFigures, Failed, Figures, Plan, Report, bench
from twofold.infer.quality import read_texts

DOCUMENTATION = "python-docs"
"""In place of a file: the texts that are on every machine."""


def bench_command(
    model: Annotated[str, typer.Argument(help="An encoder-decoder: folder or hub name.")],
    precision: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(PRECISIONS)}.")
    ] = "float32,bfloat16",
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(BACKENDS)}.")] = "auto",
    source_tokens: Annotated[int, typer.Option(help="Read by each row.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Written by each row.")] = 64,
    batch: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,8",
    runs: Annotated[int, typer.Option(help="Measured of each batch size; one more warms up.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Of the processor; default: all cores.")] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='Also measure quality beside float32, on JSON lines with "prompt" and "completion", or with "text" '
            f"(split in halves); {DOCUMENTATION}: Python's own documentation.",
        ),
    ] = None,
    quality_texts: Annotated[int, typer.Option(help="Texts of it, at most.")] = 32,
    skip_vision: SkipVisionOption = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object, as last line.")
    ] = False,
) -> None:
    """Measure a model on this machine: time to the first token, decoding speed, memory, and quality on request.

    Sources are random tokens, and every row writes exactly the tokens asked for. Each precision runs in a process of
    its own. Quality is measured with sources and continuations cut to the same lengths.
    """
    precisions = list(
        dict.fromkeys(_chosen(name, PRECISIONS, "--precision") for name in precision.split(","))
    )
    chosen_backend = cast(BackendName, _chosen(backend, BACKENDS, "--backend"))
    records: tuple[dict[str, str], ...] = ()
    if quality is not None:
        file = None if quality == DOCUMENTATION else Path(quality)
        records = tuple(read_texts(file, quality_texts))
        if "float32" not in precisions:
            precisions.insert(0, "float32")
            note("float32 is measured too: quality is compared with it")
    plans = [
        Plan(
            model=model,
            backend=chosen_backend,
            precision=cast(Precision, name),
            source_tokens=source_tokens,
            new_tokens=new_tokens,
            batch_sizes=_sizes(batch),
            runs=runs,
            threads=threads,
            skip_vision=skip_vision,
            records=records,
        )
        for name in precisions
    ]
    report = bench(plans, watch=_with_progress)
    show(report)
    if json:
        print_json(report.as_json())


def show(report: Report) -> None:
    """Tables: speed and memory, then quality; and why what is missing is missing."""
    plan = report.plans[0]
    table = Table(
        "precision",
        "batch",
        "first token, ms",
        "decode, tokens/s",
        "peak memory, GB",
        "loaded in, s",
        title=f"{plan.source_tokens} tokens read, {plan.new_tokens} written; median (min to max) of {plan.runs}",
    )
    for result in report.results:
        if isinstance(result, Failed):
            table.add_row(result.precision, "", "", "not available", "", "")
            continue
        for batch in result.batches:
            table.add_row(*_cells(result, batch))
    out.print(table)
    measured = [result for result in report.results if isinstance(result, Figures)]
    qualities = [(result.precision, report.quality(result)) for result in measured]
    if any(quality for _, quality in qualities):
        table = Table(
            "precision", "nats per token", "perplexity", "above float32", "equal tokens", "identical answers"
        )
        for name, quality in qualities:
            if quality is not None:
                table.add_row(
                    name,
                    f"{quality.nats_per_token:.4f} ± {quality.nats_error:.4f}",
                    f"{quality.perplexity:.3f}",
                    f"{quality.difference:+.4f} ± {quality.difference_error:.4f}",
                    f"{quality.equal_tokens:.1%}",
                    f"{quality.identical:.1%}",
                )
        out.print(table)
    for result in report.results:
        if isinstance(result, Failed):
            note(f"{result.precision}: {result.reason}")


def _cells(figures: Figures, batch: BatchFigures) -> list[str]:
    return [
        figures.precision,
        str(batch.batch_size),
        _range({name: 1000 * value for name, value in batch.first_token_s.items()}),
        "-" if batch.decode_tokens_per_s is None else _range(batch.decode_tokens_per_s),
        f"{batch.peak_bytes / 1e9:.2f}",
        f"{figures.load_s:.1f}",
    ]


def _range(values: dict[str, float]) -> str:
    return f"{values['median']:.1f} ({values['min']:.1f} to {values['max']:.1f})"


def _chosen(name: str, allowed: tuple[str, ...], option: str) -> str:
    if name.strip() not in allowed:
        raise ValueError(f"{option} takes {', '.join(allowed)}; got {name.strip()!r}")
    return name.strip()


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(size) for size in text.split(",")))
    except ValueError as error:
        raise ValueError(f"--batch takes whole numbers with commas between them, got {text!r}") from error


def _with_progress(plans: Iterator[Plan], total: int) -> Iterator[Plan]:
    yield from track(plans, description="measuring", total=total, console=err, transient=True)
