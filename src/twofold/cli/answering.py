"""What commands that answer files share: the bar on the way, and how to go on after a stop."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from twofold.cli.console import err, note

MOST_REPORTED = 20
"""Bad lines that are named on the terminal; all are in the output."""


@contextmanager
def answers_bar(
    n_bytes: int | None, *, n_bytes_before: int, is_shown: bool
) -> Iterator[Callable[[int, int, int], None]]:
    """A bar on a terminal, as long as the input has bytes.

    Args:
        n_bytes: of the input; None where nobody knows.
        n_bytes_before: of them that an earlier run has answered.
        is_shown: on a terminal; elsewhere there is none.

    Yields:
        What is to be called after each line, with its number, its bytes and the tokens it got.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    n_tokens, started = 0, time.perf_counter()
    with Progress(
        *columns, console=err, transient=True, disable=not (is_shown and err.is_terminal)
    ) as progress:
        bar = progress.add_task("generating", total=n_bytes, completed=n_bytes_before)

        def advance(number: int, n_line_bytes: int, n_new_tokens: int) -> None:
            nonlocal n_tokens
            n_tokens += n_new_tokens
            speed = n_tokens / (time.perf_counter() - started)
            what = f"line {number:,}, {speed:,.0f} tokens/s"
            progress.update(bar, advance=n_line_bytes, description=what)

        yield advance


def say_how_to_go_on(error: BaseException, path: Path, n_lines: int) -> None:
    """What is in the output, and the command that continues it; beside an error, or as the last word.

    Raises:
        typer.Exit: somebody stopped it.
    """
    command = [word for word in sys.argv[1:] if word != "--resume"]
    line = shlex.join(["twofold", *command, "--resume"])
    there = f"{path} has the answers to the first {n_lines:,} lines; go on with: {line}"
    if isinstance(error, KeyboardInterrupt):
        note(f"stopped: {there}")
        raise typer.Exit(130) from error
    error.add_note(there)
