"""Who sees whom: attention masks as data, by token position and segment, never by tensor index.

A mask is symbolic. Each query and each key has a position and a segment id, and each key carries the rule of
the part of the sequence it belongs to (the decoder's own past, or the source). One formula decides:

    visible(q, k) = segment(q) = segment(k) > 0
                    and  position(q) - position(k) <= past(k)        # how far back
                    and  position(k) - position(q) <= future(k)      # how far ahead
                    and  (position(q) > 0 or position(k) <= position(q) or not sink(k))

Attention backends turn it into what they want: a dense bool tensor, or FlexAttention's `BlockMask`.

Letters: B batch, T queries, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twofold.config import EncoderMask, LayerType, StackConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_FAR = 2**62
"""A distance no position reaches; small enough that its negative is an int64 too."""


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a batch stand."""

    positions: Tensor
    """int64 [B, L]. Within its segment, from 0 (or from the end of the source, for a continuing decoder)."""
    segments: Tensor
    """int64 [B, L]. 0 is padding; packed examples are 1, 2, 3... from the left."""
    is_plain: bool = False
    """True when known, without looking at the tensors, to be one segment without padding or gaps."""

    @staticmethod
    def from_segments(segments: Tensor, *, is_plain: bool = False) -> Tokens:
        """Positions counted from the first token of each segment.

        A gap inside a segment (padding between real tokens) counts, as it does where positions are
        `arange`; padding on the left does not.

        Args:
            segments: int64 [B, L]; ids grow from left to right, 0 is padding.
        """
        index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
        newest = segments.cummax(dim=1).values
        starts = torch.zeros_like(segments, dtype=torch.bool)
        starts[:, :1] = newest[:, :1] > 0
        starts[:, 1:] = newest[:, 1:] > newest[:, :-1]
        start_index = torch.where(starts, index, 0).cummax(dim=1).values
        return Tokens(index - start_index, segments, is_plain)

    def continued_after(self, source: Tokens) -> Tokens:
        """The same tokens with each segment's positions moved behind those of its source segment."""
        n_ids = max(self.segments.shape[1], source.segments.shape[1]) + 2
        lengths = torch.zeros(
            source.segments.shape[0], n_ids, dtype=torch.int64, device=source.segments.device
        )
        lengths = lengths.scatter_reduce(1, source.segments, source.positions + 1, reduce="amax")
        return Tokens(self.positions + lengths.gather(1, self.segments), self.segments, self.is_plain)

    def last(self, n: int) -> Tokens:
        """The last `n` tokens of each row."""
        start = self.segments.shape[1] - n
        return Tokens(self.positions[:, start:], self.segments[:, start:], self.is_plain)


@dataclass(frozen=True)
class Rule:
    """How far a query sees in one part of the keys, in tokens; None is without limit."""

    past: int | None = None
    future: int | None = None
    sink: bool = False
    """The query at position 0 of its segment sees no later key."""


def decoder_rule(config: StackConfig, layer_type: LayerType) -> Rule:
    """Causal; on a sliding layer the last `sliding_window` tokens, the query included."""
    if layer_type == "full_attention":
        return Rule(future=0)
    assert config.sliding_window is not None
    return Rule(past=config.sliding_window - 1, future=0)


def encoder_rule(config: StackConfig, layer_type: LayerType, mask: EncoderMask) -> Rule:
    """What an encoder layer sees: see `StackConfig.bidirectional_window` for the two meanings of a window."""
    if mask == "causal":
        return decoder_rule(config, layer_type)
    is_sink = mask == "sink"
    if layer_type == "full_attention":
        return Rule(sink=is_sink)
    assert config.sliding_window is not None
    window = config.sliding_window
    if config.bidirectional_window == "each_side":
        return Rule(past=window - 1, future=window - 1, sink=is_sink)
    return Rule(past=(window + 1) // 2 - 1, future=window // 2, sink=is_sink)


class AttentionMask:
    """Which keys each query may see.

    Args:
        queries: the T tokens that look.
        parts: what they look at, in the order of the keys in memory: (tokens, rule) for each part.
    """

    def __init__(self, queries: Tokens, *parts: tuple[Tokens, Rule]) -> None:
        self.queries = queries
        self.parts = parts

    @property
    def hides_nothing(self) -> bool:
        """Known from Python data alone: every query sees every key."""
        return self.queries.is_plain and all(keys.is_plain and rule == Rule() for keys, rule in self.parts)

    @property
    def is_plain_causal(self) -> bool:
        """Known from Python data alone: the lower triangle of a square, nothing else."""
        if len(self.parts) != 1:
            return False
        keys, rule = self.parts[0]
        n_queries, n_keys = self.queries.segments.shape[1], keys.segments.shape[1]
        window_reaches = rule.past is None or rule.past >= n_keys - 1
        return (
            self.queries.is_plain
            and keys.is_plain
            and n_queries == n_keys
            and rule.future == 0
            and window_reaches
        )

    def _key_data(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Positions and segments [B, S]; past, future int64 [S] and sink bool [S] of all parts in a row."""
        device = self.queries.segments.device
        positions = torch.cat([keys.positions for keys, _ in self.parts], dim=1)
        segments = torch.cat([keys.segments for keys, _ in self.parts], dim=1)

        def per_key(values: list[int]) -> Tensor:
            spread = [
                torch.full((keys.segments.shape[1],), value, dtype=torch.int64, device=device)
                for (keys, _), value in zip(self.parts, values, strict=True)
            ]
            return torch.cat(spread)

        past = per_key([_FAR if rule.past is None else rule.past for _, rule in self.parts])
        future = per_key([_FAR if rule.future is None else rule.future for _, rule in self.parts])
        sink = per_key([int(rule.sink) for _, rule in self.parts]).bool()
        return positions, segments, past, future, sink

    @cached_property
    def dense(self) -> Tensor:
        """bool [B, T, S], True = may attend. Computed once for all layers that share the mask."""
        positions, segments, past, future, sink = self._key_data()
        query_positions = self.queries.positions[:, :, None]
        distance_BTS = query_positions - positions[:, None, :]  # > 0: key lies in the past
        same = (self.queries.segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
        opens = (query_positions > 0) | (distance_BTS >= 0) | ~sink
        return same & (distance_BTS <= past) & (-distance_BTS <= future) & opens

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same rule as FlexAttention's block-sparse mask; no T x S tensor is made on CUDA."""
        from torch.nn.attention.flex_attention import create_block_mask

        key_positions, key_segments, past, future, sink = self._key_data()
        positions, segments = self.queries.positions, self.queries.segments

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = positions[b, q] - key_positions[b, k]
            same = (segments[b, q] == key_segments[b, k]) & (key_segments[b, k] > 0)
            opens = (positions[b, q] > 0) | (distance >= 0) | ~sink[k]
            return same & (distance <= past[k]) & (-distance <= future[k]) & opens

        n_batch, n_queries = segments.shape
        return create_block_mask(
            mask_mod, n_batch, None, n_queries, key_segments.shape[1], device=str(segments.device)
        )
