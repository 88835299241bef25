"""What a model learns from: pure, seeded functions that turn a token sequence into a source and a target."""

from twofold.objectives.pair import NOT_OF_THE_TEXT, Pair, Tokens
from twofold.objectives.prefix_lm import join, prefix_lm, split_point
from twofold.objectives.sentinels import find_sentinels
from twofold.objectives.span_corruption import restore, span_corruption
from twofold.objectives.ul2 import PRESETS, Denoiser, Mixture, sentinels_needed, ul2

__all__ = [
    "NOT_OF_THE_TEXT",
    "PRESETS",
    "Denoiser",
    "Mixture",
    "Pair",
    "Tokens",
    "find_sentinels",
    "join",
    "prefix_lm",
    "restore",
    "sentinels_needed",
    "span_corruption",
    "split_point",
    "ul2",
]
