"""What a decoder keeps between steps: its own keys and values, and the source's.

Self keys of sliding layers are bounded by the window; source keys are computed once and always kept whole.

Letters: B batch, K key-value heads, S keys, H head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValues(NamedTuple):
    """Keys and values of one layer, each [B, K, S, H]."""

    keys: Tensor
    values: Tensor

    def followed_by(self, later: KeyValues) -> KeyValues:
        """Both in a row along S."""
        return KeyValues(
            torch.cat([self.keys, later.keys], dim=2), torch.cat([self.values, later.values], dim=2)
        )

    @property
    def length(self) -> int:
        """S."""
        return self.keys.shape[2]

    def first(self, n: int) -> KeyValues:
        """The first `n` keys and values."""
        return KeyValues(self.keys[:, :, :n], self.values[:, :, :n])

    def last(self, n: int) -> KeyValues:
        """The last `n` keys and values, or all there are."""
        start = max(0, self.length - n)
        return KeyValues(self.keys[:, :, start:], self.values[:, :, start:])

    def rows(self, rows: Tensor) -> KeyValues:
        """The given batch rows, int64 [B'], in that order."""
        return KeyValues(self.keys[rows], self.values[rows])


class LayerCache(NamedTuple):
    """What one decoder layer keeps."""

    own: KeyValues
    """Of the decoder's tokens; on a sliding layer only those that a later token can see."""
    source: KeyValues
    """Of the source, always whole."""


class DecoderCache:
    """Starts empty and grows with every decoder call that gets it.

    Attributes:
        layers: one entry per decoder layer; empty before the first call.
        segments: int64 [B, P] segment ids of all P decoder tokens so far, 0 for padding. Small, kept whole: the
            positions of later tokens follow from it.
        is_plain: every call so far brought plain tokens (`Tokens.is_plain`).
    """

    def __init__(self) -> None:
        self.layers: list[LayerCache] = []
        self.segments: Tensor | None = None
        self.is_plain = True

    @property
    def n_tokens(self) -> int:
        """Decoder tokens seen so far, P."""
        return 0 if self.segments is None else self.segments.shape[1]

    @property
    def n_bytes(self) -> int:
        """Memory held by keys and values, in bytes."""
        return sum(t.numel() * t.element_size() for layer in self.layers for kv in layer for t in kv)

    def select(self, rows: Tensor) -> None:
        """Keep the given batch rows, int64 [B'], in that order (finished sequences leave, beams move)."""
        assert self.segments is not None
        self.segments = self.segments[rows]
        self.layers = [LayerCache(layer.own.rows(rows), layer.source.rows(rows)) for layer in self.layers]
