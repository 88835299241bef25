"""The `twofold` command: one thin file per verb."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import typer

from twofold.cli import adapt, average, bench, eval, export, frontier, generate, inspect, merge, plan, train
from twofold.cli.console import fail, is_main, note
from twofold.train import CheckpointError, NonFiniteError, OtherRankError

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
app.command("plan")(plan.plan_command)
app.command("average")(average.average_command)
app.command("merge")(merge.merge_command)
app.command("export")(export.export_command)
app.command("bench")(bench.bench_command)
app.command("frontier")(frontier.frontier_command)
app.command("eval")(eval.eval_command)


def main() -> None:
    """Run the command line; what a user can get wrong ends in one message and exit status 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_args, **_options: note(f"warning: {message}")
    try:
        app()
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        on_all_ranks = isinstance(error, (NonFiniteError, CheckpointError))
        if is_main() or not on_all_ranks:
            fail(_text(error))
        sys.exit(2)
    except OtherRankError as error:
        fail(_text(error))
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(130)
    except Exception as error:
        if "RANK" in os.environ:
            # The traceback follows; among those of many ranks this is the line to look for.
            fail(f"{type(error).__name__}: {_text(error)}")
        raise


def _text(error: Exception) -> str:
    """With where it happened, which a run of several ranks notes."""
    notes = getattr(error, "__notes__", [])
    return f"{error} ({'; '.join(notes)})" if notes else str(error)
