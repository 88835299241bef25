"""SuperGLUE as the paper scores it: tuned classifiers, mean dev accuracy."""

from twofold.evaluate.superglue.tasks import TASKS

__all__ = ["TASKS"]
