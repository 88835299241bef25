"""`twofold generate`: texts in, continuations out; from the command line, or from files of any size."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from twofold.checkpoint.load import load
from twofold.cli.answering import MOST_REPORTED, answers_bar, say_how_to_go_on
from twofold.cli.console import note, print_json
from twofold.cli.options import (
    BackendOption,
    BatchSizeOption,
    PrecisionOption,
    SkipVisionOption,
    ThreadsOption,
)
from twofold.infer import Engine, Request, Sampling
from twofold.infer.backends import BackendName, Precision
from twofold.infer.files import Answer, Line, answer_lines, read_lines
from twofold.infer.journal import Journal, fingerprint, refuse_existing


def generate_command(
    model: Annotated[str, typer.Argument(help="An encoder-decoder: folder or hub name.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to continue or answer.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help='JSON lines with "text" or "messages", and maybe "id"; - is stdin.'
        ),
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON lines to write, as they come.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last whole line of OUT.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first bad line instead of skipping it.")
    ] = False,
    chat: Annotated[
        bool, typer.Option(help="Wrap each text in the chat template, as a user's turn.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens for each text.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens up to p.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample from tokens at least this share as likely as the first.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides logits of tokens already written.")
    ] = 1.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Subtracted from a token's logit each time it was written.")
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Subtracted from a token's logit if it was written.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling; text i (the first is 0) draws with seed + i.")] = 0,
    num_beams: Annotated[int, typer.Option(help="Above 1: beam search.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Power of the length by which beams are ranked.")
    ] = 1.0,
    n: Annotated[int, typer.Option("-n", help="Answers to each text: samples, or the best beams.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be given more than once.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Report the likelihood of each token, and of so many others.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="Answers are JSON that is valid against the schema in this file.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Answers match this pattern as a whole.")] = None,
    lookup: Annotated[
        int, typer.Option(help="Guess up to so many tokens at once from what stands in the text: 0 is off.")
    ] = 0,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    batch_size: BatchSizeOption = 8,
    skip_vision: SkipVisionOption = False,
    json: Annotated[
        bool, typer.Option("--json", help="Answers as JSON lines, and a summary as last line.")
    ] = False,
) -> None:
    """Answer texts with an encoder-decoder. Greedy, unless a temperature is given.

    Every line of a file gets one line in OUT. One that cannot be answered gets its error there, and the exit status
    is 1 then.
    """
    template = Request(
        prompt="",
        max_new_tokens=max_new_tokens,
        sampling=Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            seed=seed,
        ),
        n=n,
        num_beams=num_beams,
        length_penalty=length_penalty,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        lookup=lookup,
    )
    _refuse_bad_use(texts, file, out_file, resume)
    if json_schema is not None and regex is not None:
        raise ValueError("--json-schema and --regex each say what answers are; give one of them")
    schema = None if json_schema is None else json_schema.read_text(encoding="utf-8")
    with ExitStack() as stack:
        lines, n_bytes = _input(texts, file, stack)
        if chat:
            lines = (_as_chat(line) for line in lines)
        started = time.perf_counter()
        loaded = load(model, skip_vision=skip_vision)
        settings = {
            "model": model,
            "weights": fingerprint(loaded),
            "input": texts or str(file),
            "chat": chat,
            "json_schema": schema,
            "regex": regex,
            "backend": backend,
            "precision": precision,
            **_settings(template),
        }
        engine = Engine(
            loaded,
            backend=cast(BackendName, backend),
            precision=cast(Precision | None, precision),
            threads=threads,
            batch_size=batch_size,
        )
        if schema is not None:
            template = replace(template, constraint=engine.json_schema(schema))
        elif regex is not None:
            template = replace(template, constraint=engine.regex(regex))
        engine.check(replace(template, prompt=None, source_ids=(), prefix_ids=(0,)))
        note(f"{model} loaded on {engine.device} in {time.perf_counter() - started:.1f} s")

        if texts and len(texts) == n == num_beams == 1 and sys.stdout.isatty() and not (out_file or json):
            _stream(engine, replace(template, prompt=next(lines).prompt))
            return
        journal = None
        if out_file is not None:
            journal = stack.enter_context(Journal(out_file, settings, lines, resume=resume))
            if journal.n_lines:
                note(f"going on after line {journal.n_lines:,} of {out_file}")
        run = _Run(journal, as_json=json or file is not None)
        answers = stack.enter_context(
            closing(answer_lines(engine, lines, template, strict=strict or file is None))
        )
        try:
            run.take(_with_progress(answers, n_bytes, journal))
        except BaseException as error:
            if journal is not None:
                say_how_to_go_on(error, journal.path, journal.n_lines)
            raise
    run.summarise(as_json=json)
    if run.n_skipped:
        raise typer.Exit(1)


class _Run:
    """Where answers go, and what they come to."""

    def __init__(self, journal: Journal | None, *, as_json: bool) -> None:
        self._journal, self._as_json = journal, as_json
        self._n_lines = self._n_errors = self._n_tokens = 0
        self._n_before = 0 if journal is None else journal.n_lines
        self._n_errors_before = 0 if journal is None else journal.n_errors
        self._started = time.perf_counter()

    @property
    def n_skipped(self) -> int:
        """Bad lines, those of earlier parts of a resumed run included."""
        return self._n_errors_before + self._n_errors

    def take(self, answers: Iterable[Answer]) -> None:
        """Write them as they come."""
        for answer in answers:
            self._n_lines += 1
            self._n_tokens += answer.n_tokens
            if answer.error is not None:
                self._n_errors += 1
                if self._n_errors <= MOST_REPORTED:
                    note(f"line {answer.line.number} skipped: {answer.error}")
            if self._journal is not None:
                self._journal.write(answer)
            elif self._as_json:
                print_json(answer.to_json())
            else:
                for completion in answer.completions:
                    print(completion.text, flush=True)

    def summarise(self, *, as_json: bool) -> None:
        """Say how much was done."""
        seconds = time.perf_counter() - self._started
        summary = {
            "lines": self._n_before + self._n_lines,
            "skipped": self.n_skipped,
            "resumed_after": self._n_before,
            "tokens": self._n_tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(self._n_tokens / seconds, 1),
            "out": None if self._journal is None else str(self._journal.path),
        }
        if self._journal is not None:
            note(f"wrote {self._journal.path}, {self._journal.n_lines:,} lines")
        note(f"{self._n_tokens:,} tokens in {seconds:.1f} s, {self._n_tokens / seconds:,.1f} tokens/s")
        if self.n_skipped:
            note(f'{self.n_skipped:,} of {summary["lines"]:,} lines were skipped; they have an "error"')
        if as_json:
            print_json(summary)


def _refuse_bad_use(texts: list[str] | None, file: Path | None, out_file: Path | None, resume: bool) -> None:
    """What can be known before the model is loaded."""
    if bool(texts) == (file is not None):
        raise ValueError("give texts on the command line, or a file with --file: exactly one of them")
    if resume and out_file is None:
        raise ValueError("--resume continues a file; name it with --out")
    if out_file is not None and not resume:
        refuse_existing(out_file)


def _input(texts: list[str] | None, file: Path | None, stack: ExitStack) -> tuple[Iterator[Line], int | None]:
    """Lines, and how many bytes they take; None where nobody knows."""
    if file is None:
        lines = [Line(number=number, prompt=text) for number, text in enumerate(texts or (), start=1)]
        return iter(lines), None
    if str(file) == "-":
        return read_lines(sys.stdin.buffer), None
    return read_lines(stack.enter_context(file.open("rb"))), file.stat().st_size


def _as_chat(line: Line) -> Line:
    if not isinstance(line.prompt, str):
        return line
    return replace(line, prompt=[{"role": "user", "content": line.prompt}])


def _settings(template: Request) -> Mapping[str, Any]:
    """What the answers depend on, of a request."""
    names = ("max_new_tokens", "n", "num_beams", "length_penalty", "stop", "logprobs")
    return {**template.sampling.model_dump(), **{name: getattr(template, name) for name in names}}


def _with_progress(
    answers: Iterator[Answer], n_bytes: int | None, journal: Journal | None
) -> Iterator[Answer]:
    """A bar on a terminal that shows nothing else."""
    is_shown = journal is not None or not sys.stdout.isatty()
    n_before = 0 if journal is None else journal.n_input_bytes
    with answers_bar(n_bytes, n_bytes_before=n_before, is_shown=is_shown) as advance:
        for answer in answers:
            advance(answer.line.number, answer.line.n_bytes, answer.n_tokens)
            yield answer


def _stream(engine: Engine, request: Request) -> None:
    """One answer, written as it comes."""
    for delta in engine.stream(request):
        print(delta.text, end="", flush=True)
    print()
