"""Generation: `generate` is plain and the reference, `Engine` is what people call."""

from twofold.infer.async_engine import AsyncEngine
from twofold.infer.engine import Engine
from twofold.infer.generate import Generated, generate
from twofold.infer.handle import Handle, RequestFailed
from twofold.infer.likelihood import Score
from twofold.infer.request import Completion, Constraint, Delta, Request, TokenLogprob
from twofold.infer.sampling import Sampling

__all__ = [
    "AsyncEngine",
    "Completion",
    "Constraint",
    "Delta",
    "Engine",
    "Generated",
    "Handle",
    "Request",
    "RequestFailed",
    "Sampling",
    "Score",
    "TokenLogprob",
    "generate",
]
