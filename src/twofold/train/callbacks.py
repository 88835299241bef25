"""What a run tells those who watch it. The loop itself never prints, logs or draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twofold.data import BuildProgress
from twofold.train.evaluate import Evaluation
from twofold.train.samples import Sample
from twofold.train.step import StepResult


@dataclass(frozen=True, slots=True)
class RunStart:
    """What is known before the first step."""

    steps: int
    first_step: int
    """1, or more in a resumed run."""
    num_parameters: int
    """Shared parameters once."""
    num_trainable: int
    device: str
    output: Path


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to."""

    output: Path
    step: int
    """Steps done."""
    is_finished: bool
    """False: a signal stopped it, and it can be resumed."""
    losses: list[float]
    """Of every step since the very first, in nats per scored token."""
    held_out: list[tuple[int, float]]
    """(steps done, held-out loss) of every evaluation."""
    tokens: int
    """Real tokens trained on, both sides."""
    seconds: float
    """Of this process's part of the run."""
    model_path: Path | None
    """The model to go on with: the final one, or with early stopping the best; None unless finished."""
    checkpoint: Path
    """The last training checkpoint."""
    best_step: int | None = None
    """With early stopping: the steps of the best evaluation."""


class Callback:
    """Base of watchers; override what you want to see."""

    def on_tokenise(self, progress: BuildProgress) -> None:
        """A source that is not in the cache yet is being read; now and then, on rank 0."""

    def on_data(self, report: Sequence[str]) -> None:
        """The data is ready: a line for each source, what was skipped or dropped included."""

    def on_reference(self, done: int, total: int) -> None:
        """What the reference says of so many preference pairs of a loader is known; before the first step, rank 0."""

    def on_start(self, run: RunStart) -> None:
        """All checks have passed; the first step follows."""

    def on_step(self, step: int, result: StepResult) -> None:
        """A step is done; `step` is 1 for the first."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """An evaluation after `step` steps."""

    def on_average_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """The same for the moving average of the weights, with `ema_decay`; comes after that of the weights."""

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Held-out prompts and their answers after `step` steps, on rank 0; comes after the evaluation."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self, result: TrainResult) -> None:
        """The run is finished or was stopped by a signal; not called after an error."""

    def close(self) -> None:
        """Always called last."""


def tokenise_progress(callbacks: Sequence[Callback]) -> Callable[[BuildProgress], None]:
    """Tells all of them how far the reading of a source is."""

    def tell(progress: BuildProgress) -> None:
        for callback in callbacks:
            callback.on_tokenise(progress)

    return tell
