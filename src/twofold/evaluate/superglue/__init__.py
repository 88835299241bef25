"""SuperGLUE as the paper scores it: tuned classifiers, mean dev accuracy."""

from twofold.evaluate.superglue.cells import Cell, Grid
from twofold.evaluate.superglue.protocol import run
from twofold.evaluate.superglue.tasks import TASKS
from twofold.evaluate.superglue.tune import Tuning

__all__ = ["TASKS", "Cell", "Grid", "Tuning", "run"]
