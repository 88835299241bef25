"""Tasks by name: from local files, or the harness's own."""

from twofold.evaluate.tasks.local import LOCAL
from twofold.evaluate.tasks.registry import main_metric, resolve
from twofold.evaluate.tasks.suites import SUITES

__all__ = ["LOCAL", "SUITES", "main_metric", "resolve"]
