"""Generation: `generate` is plain and the reference, `Engine` is what people call."""

from twofold.infer.engine import Completion, Engine
from twofold.infer.generate import Generated, generate
from twofold.infer.sampling import Sampling

__all__ = ["Completion", "Engine", "Generated", "Sampling", "generate"]
