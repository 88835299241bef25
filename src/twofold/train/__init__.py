"""Training: one loop for every stage. `train` does what a recipe says, `fit` trains a model in memory."""

from twofold.train.callbacks import Callback, RunStart, TrainResult
from twofold.train.checkpointing import CheckpointError, latest_checkpoint
from twofold.train.evaluate import Evaluation, evaluate
from twofold.train.loop import fit
from twofold.train.loss import token_loss
from twofold.train.progress import progress_for
from twofold.train.run import train
from twofold.train.step import LossModule, NonFiniteError, Objective, StepResult, train_step
from twofold.train.world import OtherRankError, World, start_world

__all__ = [
    "Callback",
    "CheckpointError",
    "Evaluation",
    "LossModule",
    "NonFiniteError",
    "Objective",
    "OtherRankError",
    "RunStart",
    "StepResult",
    "TrainResult",
    "World",
    "evaluate",
    "fit",
    "latest_checkpoint",
    "progress_for",
    "start_world",
    "token_loss",
    "train",
    "train_step",
]
