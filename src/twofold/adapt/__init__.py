"""Decoder-only donors become encoder-decoders: plan, initialise, report."""

from twofold.adapt.adaptation import adapt, adapt_to_folder
from twofold.adapt.plan import Choices, Plan, plan_adaptation

__all__ = ["Choices", "Plan", "adapt", "adapt_to_folder", "plan_adaptation"]
