"""Models for other programs: one file per target, all of them compared with the model before they appear."""

from twofold.export.export import TARGETS, Exported, Target, export

__all__ = ["TARGETS", "Exported", "Target", "export"]
