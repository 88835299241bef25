"""The result of every objective: what is read and what is to be written."""

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int64]
"""Token ids, int64 [length]."""


class Pair(NamedTuple):
    """What an objective makes of one token sequence; the data pipeline adds BOS and stop tokens."""

    source: Tokens
    """int64 [S]: the encoder reads it."""

    target: Tokens
    """int64 [T]: the decoder predicts it."""
