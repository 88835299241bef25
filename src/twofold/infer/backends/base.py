"""What the engine asks of the code that runs the model.

Letters: R rows of one request that are decoded (samples, beams), T tokens of one row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from twofold.models.attention import Attention

Floats = npt.NDArray[np.float32]

BackendName = Literal["auto", "torch", "openvino"]
Precision = Literal["float32", "bfloat16", "int8", "int4"]
"""Of weights and computation; what that means for products and cache is the backend's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A request about to be encoded."""

    source_ids: tuple[int, ...]
    """Encoder input; may be empty."""
    prefix_ids: tuple[int, ...]
    """Decoder input that is given, at least one token."""
    n_rows: int
    """R: samples or beams that will read this source."""
    n_tokens: int
    """Decoder tokens each row will hold at most: the prefix, and every new token but the last."""
    n_verified: int = 0
    """T, the most tokens that `Backend.verify` will get at once for this request, which then has one row. 0: it will
    not be called. A backend that cannot verify need not look at it."""


class Held(Protocol):
    """What a backend keeps of one running request."""

    @property
    def n_rows(self) -> int:
        """R."""
        ...

    @property
    def n_bytes(self) -> int:
        """Memory held by keys and values."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order. One may be named more than once, but there must not be more than
        the request started with."""
        ...

    def accept(self, n: int) -> None:
        """Take in the first `n` of the tokens that were verified last; the others never were."""
        ...


class Backend(Protocol):
    """Encodes sources and decodes one token at a time for rows of any mixture of requests."""

    @property
    def can_verify(self) -> bool:
        """`verify` and `Held.accept` work here. Where not, neither is called, and requests that ask for `lookup` are
        decoded token by token."""
        ...

    def bytes_needed(self, start: Start) -> int:
        """What `Held.n_bytes` of this request will be, at its largest."""
        ...

    def start(self, starts: Sequence[Start]) -> list[tuple[Held, Tensor]]:
        """Encode some sources together and run the decoder over their prefixes.

        Returns:
            For each request what is held of it, and the logits of its first new token, float32 [V].
        """
        ...

    def step(self, held: Sequence[Held], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """One token more in every row.

        Args:
            held: requests that take part; what they hold grows by the token. After an error the call may be
                repeated, with all or some of them.
            tokens: for each request the newest token of each of its rows.

        Returns:
            For each request the logits of the next token, float32 [R, V].
        """
        ...

    def verify(self, held: Held, tokens: Sequence[int]) -> Tensor:
        """Several tokens in a row, of which the first is certain and the others are guessed.

        Nothing is taken in before `Held.accept` says how many were right, so that the call may be repeated after an
        error, and steps without it go on from where they were.

        Args:
            held: a request with one row.
            tokens: its newest token and the guesses after it, T in all, at most `Start.n_verified`.

        Returns:
            The logits of the token after each of them, float32 [T, V].
        """
        ...


class Attend(Protocol):
    """Attention of one sub-layer over what is kept of every token's row, for a `DecoderRun`.

    Letters: M tokens, N query heads, K key-value heads, H head_dim.
    """

    def __call__(
        self, layer: int, attention: Attention, q: Floats, new: tuple[Floats, Floats] | None, out: Floats
    ) -> None:
        """Into `out` [M, N, H], from queries `q` [M, N, H].

        Args:
            new: keys and values [M, K, H] of the tokens themselves; None for cross-attention.
        """
        ...


class DecoderRun(Protocol):
    """Runs the decoder over M tokens of any rows and places, on the CPU."""

    def run(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits float32 [M, V], in memory that the next call writes to.

        Args:
            input_ids: int64 [M].
            positions: int64 [M].
            attend: stores and reads keys and values.
        """
        ...
