"""Generation: `generate` is plain and the reference, `Engine` is what people call."""

from twofold.infer.generate import Completion, Engine, Generated, generate
from twofold.infer.sampling import Sampling

__all__ = ["Completion", "Engine", "Generated", "Sampling", "generate"]
