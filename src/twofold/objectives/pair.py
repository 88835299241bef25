"""The result of every objective: what is read and what is to be written."""

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int64]
"""Token ids, int64 [length]."""

NOT_OF_THE_TEXT = -1
"""Origin of a token that was added."""


class Pair(NamedTuple):
    """What an objective makes of one token sequence; the data pipeline adds BOS and stop tokens."""

    source: Tokens
    """int64 [S]: the encoder reads it."""

    target: Tokens
    """int64 [T]: the decoder predicts it."""

    origins: Tokens | None = None
    """int64 [T]: which token of the sequence each target token is, NOT_OF_THE_TEXT for a sentinel. None: the pair
    was not made of one sequence."""
