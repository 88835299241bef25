"""Where commands print: messages and progress to stderr, results to stdout, so that `--json` output stays clean."""

import json
import os
from typing import Any

from rich.console import Console
from rich.markup import escape

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def is_main() -> bool:
    """Whether this process speaks for the run: of those that torchrun started, rank 0."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """One line about what is going on; from one process of a run."""
    if is_main():
        err.print(escape(message), soft_wrap=True)


def fail(message: str) -> None:
    """What went wrong."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON object on one line, unwrapped; from one process of a run."""
    if is_main():
        print(json.dumps(value, ensure_ascii=False), flush=True)
