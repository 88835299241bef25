"""Who sees whom: attention masks as data, by token position and segment, never by tensor index.

A mask is symbolic. Each query and each key has a position and a segment id, and each key carries the rule of
the part of the sequence it belongs to (the decoder's own past, or the source). One formula decides:

    visible(q, k) = segment(q) = segment(k) > 0
                    and  position(q) - position(k) <= past(k)        # how far back
                    and  position(k) - position(q) <= future(k)      # how far ahead
                    and  (position(q) > 0 or position(k) <= position(q) or not sink(k))

Keys after the query may also be limited: all together they get at most `future_share` of the query's attention, so
that an encoder can be opened by degrees (`AttentionMask.future_share`).

With a token's segment and position written as one number, its *coordinate*, each key is seen from one interval
of coordinates (`AttentionMask.intervals`). Attention backends turn that into what they want: a dense bool tensor,
FlexAttention's `BlockMask`, or runs of tokens that see each other.

Letters: B batch, T queries, S keys.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.config import EncoderMask, LayerType, StackConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SEGMENT_BITS = 32
"""A coordinate is `segment * 2**32 + position`: no token of one segment lies in an interval of another."""

_NOWHERE = -1
"""Coordinate of padding, below those of all tokens; also the end of the interval of a padding key."""

_BEYOND = 2**62
"""Above all coordinates: the start of the interval of a padding key."""

_FLEX_BLOCK = 128
"""Queries and keys in one block of FlexAttention's lists, its own default."""

_RUN_BLOCK = 256
"""Queries in one block of a run: a causal run computes up to this many keys too many for each query."""


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a batch stand."""

    positions: Tensor
    """int64 [B, L]. Within its segment, from 0 (or from the end of the source, for a continuing decoder); far
    below 2**32."""
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
    future_share: float = 1.0
    """Above 0, at most 1: of a query's attention, what all keys after it get at most, together."""


def decoder_rule(config: StackConfig, layer_type: LayerType) -> Rule:
    """Causal; on a sliding layer the last `sliding_window` tokens, the query included."""
    if layer_type == "full_attention":
        return Rule(future=0)
    assert config.sliding_window is not None
    return Rule(past=config.sliding_window - 1, future=0)


def encoder_rule(
    config: StackConfig, layer_type: LayerType, mask: EncoderMask, future_share: float = 1.0
) -> Rule:
    """What an encoder layer sees: see `StackConfig.bidirectional_window` for the two meanings of a window."""
    if mask == "causal":
        return decoder_rule(config, layer_type)
    past = future = None
    if layer_type == "sliding_attention":
        assert config.sliding_window is not None
        window = config.sliding_window
        if config.bidirectional_window == "each_side":
            past = future = window - 1
        else:
            past, future = (window + 1) // 2 - 1, window // 2
    return Rule(past=past, future=future, sink=mask == "sink", future_share=future_share)


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries of a run, and which of the run's keys they see."""

    queries: slice
    """Counted from the first query of the run."""
    keys: slice
    """A range of the run's keys, joined, outside which these queries see nothing."""
    hidden: slice | None
    """The columns of that range in which some key is hidden from some query; None where nothing is."""
    is_causal: bool
    """Exactly the lower triangle of a square."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring queries of one segment, and the keys of that segment."""

    rows: slice
    """One batch row, or all of them where they are alike."""
    queries: slice
    """Of the T queries."""
    keys: tuple[slice, ...]
    """Of the S keys; several where padding or other segments lie between, or the keys have several parts."""
    blocks: tuple[Block, ...]
    """In the order of the queries. Queries in none of them see no key."""


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
        """Known from Python data alone: every query sees every key, without limit."""
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

    @cached_property
    def intervals(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole formula in three tensors: visible(q, k) = first(k) <= at(q) <= last(k).

        `at` is a query's coordinate, and [first, last] the coordinates from which a key is seen. A sink hides
        every later key from position 0: there `first` is position 1. Padding has no place in any interval.

        Returns:
            at int64 [B, T]; first and last int64 [B, S].
        """
        segments = self.queries.segments
        at = torch.where(segments > 0, (segments << _SEGMENT_BITS) + self.queries.positions, _NOWHERE)
        firsts, lasts = [], []
        for keys, rule in self.parts:
            base, is_real = keys.segments << _SEGMENT_BITS, keys.segments > 0
            first, last = torch.zeros_like(base), torch.full_like(base, 2**_SEGMENT_BITS - 1)
            if rule.future is not None:
                first = keys.positions - rule.future
            if rule.sink:
                first = torch.maximum(first, (keys.positions > 0).long())
            if rule.past is not None:
                last = keys.positions + rule.past
            firsts.append(torch.where(is_real, base + first, _BEYOND))
            lasts.append(torch.where(is_real, base + last, _NOWHERE))
        return at, torch.cat(firsts, dim=1), torch.cat(lasts, dim=1)

    @property
    def future_share(self) -> float:
        """Known from Python data alone: what keys after a query get at most of its attention, all together. Where
        keys before it are hidden from a query, nothing is limited."""
        (share,) = {rule.future_share for _, rule in self.parts}
        return share

    @cached_property
    def earlier(self) -> AttentionMask:
        """The same without the keys after each query."""
        parts = ((keys, replace(rule, future=0, future_share=1.0)) for keys, rule in self.parts)
        return AttentionMask(self.queries, *parts)

    @cached_property
    def later(self) -> AttentionMask:
        """The same without the query itself and the keys before it."""
        parts = ((keys, replace(rule, past=-1, future_share=1.0)) for keys, rule in self.parts)
        return AttentionMask(self.queries, *parts)

    @cached_property
    def dense(self) -> Tensor:
        """bool [B, T, S], True = may attend. Computed once for all layers that share the mask."""
        at, first, last = self.intervals
        return (first[:, None, :] <= at[:, :, None]) & (at[:, :, None] <= last[:, None, :])

    def block_kinds(self, block_size: int) -> tuple[Tensor, Tensor]:
        """Which blocks of the mask are empty, and which are full, from the bounds of each block alone.

        Full is exact, but for the last blocks of a length that `block_size` does not divide: they are never
        full. An empty block may be missed where the coordinates of a block's queries, or the intervals of its
        keys, leave a gap; in packed rows they leave none that matters, as coordinates grow from left to right.

        Returns:
            is_empty, is_full: bool [B, ceil(T / block_size), ceil(S / block_size)].
        """
        at, first, last = self.intervals

        def blocks(x: Tensor, fill: int) -> Tensor:
            padded = F.pad(x, (0, -x.shape[1] % block_size), value=fill)
            return padded.view(len(x), -1, block_size)

        at, first, last = blocks(at, _NOWHERE), blocks(first, _BEYOND), blocks(last, _NOWHERE)
        highest = at.amax(-1)[:, :, None]
        lowest = torch.where(at == _NOWHERE, _BEYOND, at).amin(-1)[:, :, None]
        is_empty = (highest < first.amin(-1)[:, None]) | (lowest > last.amax(-1)[:, None])
        is_full = (at.amin(-1)[:, :, None] >= first.amax(-1)[:, None]) & (highest <= last.amin(-1)[:, None])
        return is_empty, is_full

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same rule as FlexAttention's block-sparse mask. Its lists come from `block_kinds`, so that no
        T x S tensor is made, nothing is compiled and nothing waits for the device."""
        from torch.nn.attention.flex_attention import BlockMask

        at, first, last = self.intervals

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (first[b, k] <= at[b, q]) & (at[b, q] <= last[b, k])

        def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
            """How many key blocks are chosen for each query block, and their numbers, those first."""
            order = chosen.int().argsort(dim=-1, descending=True, stable=True)
            return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

        is_empty, is_full = self.block_kinds(_FLEX_BLOCK)
        return BlockMask.from_kv_blocks(
            *listed(~(is_empty | is_full)),
            *listed(is_full),
            BLOCK_SIZE=_FLEX_BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(at.shape[1], first.shape[1]),
        )

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The visible pairs as runs of queries and keys of one segment, row by row (waits for the device).

        Computed once for all layers that share the mask.
        """
        at, first, last = (x.cpu().numpy() for x in self.intervals)
        if all((x == x[:1]).all() for x in (at, first, last)):
            return tuple(_runs_of_row(slice(0, len(at)), at[0], first[0], last[0]))
        return tuple(
            run
            for row in range(len(at))
            for run in _runs_of_row(slice(row, row + 1), at[row], first[row], last[row])
        )

    def hidden(self, run: Run, block: Block) -> Tensor:
        """bool [queries, columns] of the block's `hidden` columns: True = may not attend."""
        assert block.hidden is not None
        at, first, last = self._of_block(run, block, *self.intervals)
        return (first[block.hidden] > at) | (at > last[block.hidden])

    def visible(self, run: Run, block: Block) -> Tensor:
        """bool [queries, keys] of a block: True = may attend."""
        at, first, last = self._of_block(run, block, *self.intervals)
        return (first <= at) & (at <= last)

    @staticmethod
    def _of_block(run: Run, block: Block, at: Tensor, *of_keys: Tensor) -> tuple[Tensor, ...]:
        """Values of the block's queries [L, 1], and of its keys [M]."""
        row = run.rows.start
        of_block = (torch.cat([x[row, keys] for keys in run.keys])[block.keys] for x in of_keys)
        return (at[row, run.queries][block.queries][:, None], *of_block)


def limit_share(weights: Tensor, is_later: Tensor, share: float) -> Tensor:
    """Attention weights in which the later keys of a query get no more than a share, and the earlier ones the rest.

    Where later keys get more, all of them are scaled down by one factor to `share` in all, and all earlier keys up by
    another to `1 - share`. So a query attends to (1 - w) of what it found before it and w of what it found after it,
    w = min(share, what the softmax gives later keys). A query that sees no earlier key is left as it is.

    Args:
        weights: [..., T, S], after the softmax; hidden keys have 0.
        is_later: bool, broadcast to that.
    """
    later = (weights * is_later).sum(dim=-1, keepdim=True)
    earlier = (weights * ~is_later).sum(dim=-1, keepdim=True)
    is_limited = (later > share) & (earlier > 0)
    # Divisors that are not used must not be 0: their gradients would be NaN.
    down = torch.where(is_limited, share / torch.where(is_limited, later, 1.0), 1.0)
    up = torch.where(is_limited, (1.0 - share) / torch.where(is_limited, earlier, 1.0), 1.0)
    return weights * torch.where(is_later, down, up)


_Coordinates = npt.NDArray[np.int64]


def _runs_of_row(rows: slice, at: _Coordinates, first: _Coordinates, last: _Coordinates) -> list[Run]:
    """The runs of one row, given its `AttentionMask.intervals`: at [T], first and last [S]."""
    keys_of: dict[int, list[slice]] = {}
    for segment, keys in _stretches(last >> _SEGMENT_BITS):
        keys_of.setdefault(segment, []).append(keys)
    runs = []
    for segment, queries in _stretches(at >> _SEGMENT_BITS):
        if segment in keys_of:
            parts = keys_of[segment]
            joined = (np.concatenate([x[keys] for keys in parts]) for x in (first, last))
            runs.append(Run(rows, queries, tuple(parts), tuple(_blocks_of_run(at[queries], *joined))))
    return runs


def _stretches(segments: _Coordinates) -> list[tuple[int, slice]]:
    """Neighbours with the same segment id, from left to right, without padding."""
    edges = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    found = [(int(segments[a]), slice(a, b)) for a, b in itertools.pairwise(edges) if a < b]
    return [(segment, where) for segment, where in found if segment > 0]


def _blocks_of_run(at: _Coordinates, first: _Coordinates, last: _Coordinates) -> list[Block]:
    blocks = []
    for start in range(0, len(at), _RUN_BLOCK):
        here = at[start : start + _RUN_BLOCK]
        lowest, highest = here.min(), here.max()
        seen = np.flatnonzero((first <= highest) & (last >= lowest))
        if not len(seen):
            continue
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        opens, closes = first[keys], last[keys]
        partly = np.flatnonzero((opens > lowest) | (closes < highest))
        hidden = slice(int(partly[0]), int(partly[-1]) + 1) if len(partly) else None
        is_causal = np.array_equal(opens, here) and bool(
            (np.diff(here) > 0).all() and closes.min() >= highest
        )
        blocks.append(Block(slice(start, start + len(here)), keys, hidden, is_causal))
    return blocks
