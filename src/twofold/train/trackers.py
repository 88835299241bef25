"""Records of a run in its output folder: metrics.jsonl, TensorBoard scalars, loss.png."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import indent
from typing import Any, TextIO

from twofold.train.callbacks import Callback, RunStart, TrainResult
from twofold.train.evaluate import Evaluation
from twofold.train.samples import Sample
from twofold.train.step import StepResult


class _LinesFile(Callback):
    """One JSON object per line, on the disk as it comes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def on_start(self, run: RunStart) -> None:
        # A run that died after its last checkpoint does those steps again; their first lines go.
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _is_before(line, run.first_step)]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")


class SamplesFile(_LinesFile):
    """samples.jsonl: step, number of the prompt, prompt, reference, answer."""

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            self._write({"step": step, "number": number, **asdict(sample)})


class MetricsFile(_LinesFile):
    """metrics.jsonl.

    Lines of steps: step, loss, scored_tokens, real_tokens, grad_norm, learning_rate, seconds. Lines of
    evaluations: step, held_out_loss (or held_out_loss_average, of the average weights), held_out_tokens. Both with the
    objective's own metrics, where it has any.
    """

    def __init__(self, path: Path, every: int) -> None:
        """`every`: steps between lines."""
        super().__init__(path)
        self._every = every

    def on_step(self, step: int, result: StepResult) -> None:
        if step % self._every == 0:
            line = asdict(result)
            self._write({"step": step, **line.pop("metrics"), **line})

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._write(_held_out(step, evaluation))

    def on_average_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._write(_held_out(step, evaluation, "_average"))


def _held_out(step: int, evaluation: Evaluation, suffix: str = "") -> dict[str, Any]:
    metrics = {"loss": evaluation.loss, **evaluation.metrics}
    named = {f"held_out_{name}{suffix}": value for name, value in metrics.items()}
    return {"step": step, **named, "held_out_tokens": evaluation.scored_tokens}


def _is_before(line: str, first_step: int) -> bool:
    """Whether a line belongs to an earlier step; a line cut short by a crash does not."""
    try:
        return int(json.loads(line)["step"]) < first_step
    except json.JSONDecodeError:
        return False


class TensorBoardScalars(Callback):
    """The same numbers for TensorBoard; without the package a warning, once."""

    def __init__(self, folder: Path, every: int) -> None:
        """`every`: steps between points."""
        self._folder = folder
        self._every = every
        self._writer: Any = None

    def on_start(self, run: RunStart) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warnings.warn(
                'no TensorBoard scalars: tensorboard is not installed; pip install "twofold[tensorboard]", or set '
                "tensorboard=false",
                stacklevel=2,
            )
            return
        make_writer: Any = SummaryWriter
        self._writer = make_writer(str(self._folder), purge_step=run.first_step)

    def on_step(self, step: int, result: StepResult) -> None:
        if self._writer is not None and step % self._every == 0:
            for name in ("loss", "grad_norm", "learning_rate"):
                self._writer.add_scalar(f"train/{name}", getattr(result, name), step)
            for name, value in result.metrics.items():
                self._writer.add_scalar(f"train/{name}", value, step)
            self._writer.add_scalar("train/tokens_per_s", result.real_tokens / result.seconds, step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if self._writer is not None:
            self._writer.add_scalar("held_out/loss", evaluation.loss, step)
            for name, value in evaluation.metrics.items():
                self._writer.add_scalar(f"held_out/{name}", value, step)

    def on_average_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if self._writer is not None:
            self._writer.add_scalar("held_out/loss_average", evaluation.loss, step)

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        if self._writer is not None:
            for number, sample in enumerate(samples):
                parts = asdict(sample).items()  # indented: markdown takes it as it stands
                text = "\n\n".join(f"**{name}**\n\n{indent(value, '    ')}" for name, value in parts)
                self._writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class LossPlot(Callback):
    """loss.png at the end of a run; without matplotlib a warning."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_end(self, result: TrainResult) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            warnings.warn(
                f'no {self._path.name}: matplotlib is not installed; pip install "twofold[plot]"',
                stacklevel=2,
            )
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(range(1, len(result.losses) + 1), result.losses, color="0.6", linewidth=1, label="training")
        if result.held_out:
            axes.plot(*zip(*result.held_out, strict=True), color="C0", marker="o", label="held out")
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self._path, dpi=120)
