"""Training: one loop for every stage. `train` does what a recipe says, `fit` trains a model in memory."""

from twofold.train.callbacks import Callback, RunStart, TrainResult
from twofold.train.checkpointing import latest_checkpoint
from twofold.train.evaluate import Evaluation, evaluate
from twofold.train.loop import fit
from twofold.train.loss import token_loss
from twofold.train.progress import progress_for
from twofold.train.run import train
from twofold.train.step import LossModule, NonFiniteError, StepResult, train_step

__all__ = [
    "Callback",
    "Evaluation",
    "LossModule",
    "NonFiniteError",
    "RunStart",
    "StepResult",
    "TrainResult",
    "evaluate",
    "fit",
    "latest_checkpoint",
    "progress_for",
    "token_loss",
    "train",
    "train_step",
]
