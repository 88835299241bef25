"""Scores of models, what they cost, and both in one picture."""

from twofold.evaluate.contender import Contender, Kind, contender_config, kind_of, open_contender
from twofold.evaluate.results import Evaluation, TaskResult

__all__ = ["Contender", "Evaluation", "Kind", "TaskResult", "contender_config", "kind_of", "open_contender"]
