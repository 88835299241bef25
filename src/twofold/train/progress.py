"""What a run looks like in a terminal: a bar where it is interactive, plain lines where not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from twofold.data import BuildProgress
from twofold.train.callbacks import Callback, RunStart, TrainResult
from twofold.train.evaluate import Evaluation
from twofold.train.samples import Sample
from twofold.train.step import StepResult

_SECONDS_BETWEEN_PROGRESS = 5.0
"""Of what comes before the first step."""

_WINDOW = 20
"""Steps over which loss and speed are averaged."""


def progress_for(console: Console, *, seconds_between_lines: float = 10.0) -> Callback:
    """A progress bar on an interactive console, otherwise plain lines.

    Args:
        console: where to write.
        seconds_between_lines: least time between two plain lines of steps.
    """
    return ProgressBar(console) if console.is_terminal else ProgressLines(console, seconds_between_lines)


class Smoothed:
    """Means over the last steps."""

    def __init__(self, steps: int) -> None:
        """`steps`: number of the last step."""
        self._steps = steps
        self._recent: deque[StepResult] = deque(maxlen=_WINDOW)

    def add(self, result: StepResult) -> None:
        self._recent.append(result)

    def describe(self, step: int) -> str:
        """Loss, speed and time left after `step` steps, in words; what else the objective says is the last step's."""
        seconds = sum(r.seconds for r in self._recent)
        loss = sum(r.loss * r.scored_tokens for r in self._recent) / sum(
            r.scored_tokens for r in self._recent
        )
        tokens_per_s = sum(r.real_tokens for r in self._recent) / seconds
        left = duration((self._steps - step) * seconds / len(self._recent))
        return f"loss {loss:.4f}{_named(self._recent[-1].metrics)}, {tokens_per_s:,.0f} tokens/s, {left} left"


def _named(metrics: Mapping[str, float]) -> str:
    return "".join(f", {name.replace('_', ' ')} {value:.3g}" for name, value in metrics.items())


def shorten(text: str, length: int) -> str:
    """On one line, its end where it is too long: that is where a prompt comes to its point."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"...{line[-length:]}"


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class _Watcher(Callback):
    """What both ways of showing have in common."""

    def __init__(self, console: Console) -> None:
        self._console = console

        self._last_progress = time.monotonic()

    def on_tokenise(self, progress: BuildProgress) -> None:
        if time.monotonic() - self._last_progress >= _SECONDS_BETWEEN_PROGRESS:
            self._last_progress = time.monotonic()
            self._say(
                f"tokenising {progress.path}: {progress.share_read:.0%}, {progress.documents:,} documents, "
                f"{progress.tokens:,} tokens"
            )

    def on_data(self, report: Sequence[str]) -> None:
        for line in report:
            self._say(line)

    def on_reference(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._last_progress >= _SECONDS_BETWEEN_PROGRESS:
            self._last_progress = time.monotonic()
            self._say(f"log-probabilities under the reference: {done:,} of {total:,} pairs")

    def on_start(self, run: RunStart) -> None:
        self._steps = run.steps
        self._smoothed = Smoothed(run.steps)
        share = (
            ""
            if run.num_trainable == run.num_parameters
            else f" ({run.num_trainable / 1e6:,.1f}M of them train)"
        )
        self._say(f"{run.num_parameters / 1e6:,.1f}M parameters{share} on {run.device}")
        if run.first_step > 1:
            self._say(f"going on after step {run.first_step - 1}")

    def on_step(self, step: int, result: StepResult) -> None:
        self._smoothed.add(result)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._say(
            f"step {step}: held-out loss {evaluation.loss:.4f}{_named(evaluation.metrics)} over "
            f"{evaluation.scored_tokens:,} tokens"
        )

    def on_average_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._say(f"step {step}: held-out loss of the average weights {evaluation.loss:.4f}")

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples[:1]:
            self._say(f"step {step}: {shorten(sample.prompt, 100)} -> {shorten(sample.answer, 200)}")

    def on_end(self, result: TrainResult) -> None:
        if result.best_step is not None:
            self._say(f"the best evaluation was after step {result.best_step}")
        self._say(
            f"{result.tokens:,} tokens in {result.step} steps; this part took {duration(result.seconds)}"
        )

    def _say(self, text: str) -> None:
        self._console.print(escape(text))


class ProgressBar(_Watcher):
    """A bar with step, smoothed loss, speed and time left; other events are lines above it."""

    def on_start(self, run: RunStart) -> None:
        super().on_start(run)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task("", total=run.steps, completed=run.first_step - 1)
        self._progress.start()

    def on_step(self, step: int, result: StepResult) -> None:
        super().on_step(step, result)
        self._progress.update(self._task, completed=step, description=self._smoothed.describe(step))

    def close(self) -> None:
        if hasattr(self, "_progress"):
            self._progress.stop()


class ProgressLines(_Watcher):
    """A line now and then, and for the first and the last step."""

    def __init__(self, console: Console, seconds_between_lines: float) -> None:
        super().__init__(console)
        self._interval = seconds_between_lines
        self._last_line = -float("inf")

    def on_step(self, step: int, result: StepResult) -> None:
        super().on_step(step, result)
        now = time.monotonic()
        if now - self._last_line >= self._interval or step == self._steps:
            self._last_line = now
            self._say(f"step {step}/{self._steps}: {self._smoothed.describe(step)}")
