"""The `twofold` command: one thin file per verb."""

from __future__ import annotations

import logging
import sys
import warnings

import typer

from twofold.cli import adapt, average, generate, inspect, train
from twofold.cli.console import fail, note
from twofold.train import NonFiniteError

app = typer.Typer(
    name="twofold",
    help="Turn a decoder-only language model into an encoder-decoder: adapt, train, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("adapt")(adapt.adapt_command)
app.command("inspect")(inspect.inspect_command)
app.command("generate")(generate.generate_command)
app.command("train")(train.train_command)
app.command("average")(average.average_command)


def main() -> None:
    """Run the command line; what a user can get wrong ends in one message and exit status 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_args, **_options: note(f"warning: {message}")
    try:
        app()
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        fail(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(130)
