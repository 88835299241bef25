"""`twofold batch`: files in OpenAI's batch format, answered without a server."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from twofold.cli.answering import MOST_REPORTED, answers_bar, say_how_to_go_on
from twofold.cli.console import note, print_json
from twofold.cli.options import (
    BackendOption,
    BatchSizeOption,
    PrecisionOption,
    SkipVisionOption,
    ThreadsOption,
)
from twofold.infer import Engine
from twofold.infer.backends import BackendName, Precision
from twofold.infer.files import BadLine
from twofold.infer.journal import fingerprint, refuse_existing

if TYPE_CHECKING:
    from twofold.serve.batch_files import BatchLine, Outcome
    from twofold.serve.batch_journal import BatchJournal
    from twofold.serve.opening import EngineOptions

_MOST_BROKEN = 10
"""Lines in a row that the model fails on: after these the others would fare no better."""


def batch_command(
    model: Annotated[str, typer.Argument(help="An encoder-decoder: folder or hub name.")],
    file: Annotated[
        Path,
        typer.Argument(help='JSON lines with "custom_id", "method", "url" and "body", as OpenAI has it.'),
    ],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="Responses to write, as they come.")],
    errors_file: Annotated[
        Path | None, typer.Option("--errors", help="Where failed lines go; default: OUT with .errors in it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last line that has an outcome.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first line that fails instead of noting it.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help='What lines call the model in "model"; default: its folder\'s name.')
    ] = None,
    seed: Annotated[int, typer.Option(help="From which lines that give none get seeds of their own.")] = 0,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    batch_size: BatchSizeOption = 8,
    skip_vision: SkipVisionOption = False,
    ray: Annotated[
        int | None,
        typer.Option(
            "--ray", metavar="N", help="Run N models on the Ray cluster of RAY_ADDRESS, or on this machine."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="A summary as JSON.")] = False,
) -> None:
    """Answer a file of requests to OpenAI's API, as a server would. Lines ask for completions, chat completions or
    embeddings.

    Every line gets one in OUT, or in the file of errors; the exit status is 1 if there are any there.
    """
    from twofold.serve.batch_files import read_batch_lines
    from twofold.serve.batch_journal import BatchJournal
    from twofold.serve.opening import EngineOptions

    errors_file = errors_file or out_file.with_suffix(f".errors{out_file.suffix}")
    name = name or Path(model).name or model
    if ray is not None and ray < 1:
        raise ValueError(f"--ray must be at least 1 worker, got {ray}")
    if not resume:
        refuse_existing(out_file)
        refuse_existing(errors_file)
    options = EngineOptions(
        model=model,
        skip_vision=skip_vision,
        backend=cast(BackendName, backend),
        precision=cast(Precision | None, precision),
        threads=threads,
        batch_size=batch_size,
    )
    with ExitStack() as stack:
        lines = read_batch_lines(stack.enter_context(file.open("rb")))
        started = time.perf_counter()
        loaded = options.load()
        settings = {
            "model": model,
            "name": name,
            "weights": fingerprint(loaded),
            "input": str(file),
            "seed": seed,
            "backend": backend,
            "precision": precision,
        }
        note(f"{model} loaded in {time.perf_counter() - started:.1f} s")
        journal = stack.enter_context(BatchJournal(out_file, errors_file, settings, lines, resume=resume))
        if journal.n_lines:
            note(f"going on after line {journal.n_lines:,} of {file}")
        run = _Run(journal)
        try:
            if ray is None:
                outcomes = _here(name, options.engine(loaded), journal.rest, seed, stack)
            else:
                del loaded  # the workers have theirs
                outcomes = _on_ray(name, options, journal.rest, ray, seed)
            run.take(stack.enter_context(closing(outcomes)), file.stat().st_size, strict=strict)
        except BaseException as error:
            say_how_to_go_on(error, out_file, journal.n_lines)
            raise
    run.summarise(as_json=json)
    if journal.n_errors:
        raise typer.Exit(1)


class _Run:
    """Outcomes on their way into the files, and what they come to."""

    def __init__(self, journal: BatchJournal) -> None:
        self._journal = journal
        self._n_before = journal.n_lines
        self._n_tokens = 0
        self._started = time.perf_counter()

    def take(self, outcomes: Iterator[Outcome], n_bytes: int, *, strict: bool) -> None:
        """Write them as they come."""
        with answers_bar(n_bytes, n_bytes_before=self._journal.n_input_bytes, is_shown=True) as advance:
            n_broken = 0
            for outcome in outcomes:
                error = outcome.error
                if error is not None and strict:
                    raise BadLine(f"line {outcome.line.number}: {error}")
                n_broken = n_broken + 1 if outcome.is_broken else 0
                if n_broken == _MOST_BROKEN:
                    raise BadLine(
                        f"{n_broken} lines in a row, up to {outcome.line.number}, failed through no fault of theirs: "
                        f"{error}"
                    )
                self._journal.write(outcome)
                self._n_tokens += outcome.n_tokens
                advance(outcome.line.number, outcome.line.n_bytes, outcome.n_tokens)
                if error is not None and self._journal.n_errors <= MOST_REPORTED:
                    note(f"line {outcome.line.number} failed: {error}")

    def summarise(self, *, as_json: bool) -> None:
        """Say how much was done."""
        journal, seconds = self._journal, time.perf_counter() - self._started
        summary = {
            "lines": journal.n_lines,
            "failed": journal.n_errors,
            "resumed_after": self._n_before,
            "tokens": self._n_tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(self._n_tokens / seconds, 1),
            "out": str(journal.answers_path),
            "errors": str(journal.errors_path) if journal.n_errors else None,
        }
        note(f"wrote {journal.answers_path}, {journal.n_lines - journal.n_errors:,} answers")
        if journal.n_errors:
            note(f"wrote {journal.errors_path}, {journal.n_errors:,} lines that failed")
        note(f"{self._n_tokens:,} tokens in {seconds:.1f} s, {self._n_tokens / seconds:,.1f} tokens/s")
        if as_json:
            print_json(summary)


def _here(
    name: str, engine: Engine, lines: Iterator[BatchLine], seed: int, stack: ExitStack
) -> Generator[Outcome, None, None]:
    """By a model in this process, which ends with the stack."""
    from twofold.serve.batch import Batches, batch_app

    batches = Batches(batch_app(name, engine), seed=seed)
    stack.callback(batches.close)
    return batches.answer(lines)


def _on_ray(
    name: str, options: EngineOptions, lines: Iterator[BatchLine], n_workers: int, seed: int
) -> Generator[Outcome, None, None]:
    from twofold.serve.ray_batch import answer_on_ray

    return answer_on_ray(name, options, lines, n_workers=n_workers, seed=seed)
