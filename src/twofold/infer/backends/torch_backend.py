"""The model's own modules, eagerly: exact on every device, and the reference for faster backends.

Keys and values are kept request by request, at the size the request needs: the source's once for all its rows,
the rows' own in buffers made once, which on sliding layers are rings of the window's size. Linear layers run on
all rows of a step together; attention runs request by request, so that nothing is padded and no mask is needed:
all rows of a request have the same length, and what they may not see is not in what they are given.

Tokens to be verified go through the model as the rows of a step would. Their keys lie in a buffer of their own until
they are accepted, so that a ring never has to give back what was overwritten; who sees whom there takes a mask.

Letters: B rows of all requests of a step, R rows of one request, T tokens to be verified, N query heads, K key-value
heads, S source tokens, C columns of a buffer, H head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from twofold.config import EncoderDecoderConfig, LayerType
from twofold.infer.backends.base import Held, Start
from twofold.infer.backends.prefill import prefill
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention, attend_everything
from twofold.models.cache import KeyValues, LayerCache
from twofold.models.masks import decoder_rule


class TorchBackend:
    """Runs an `EncoderDecoder` where it lies.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: EncoderDecoder) -> None:
        self.model = model
        weight = model.lm_head.out_proj.weight
        self.device = weight.device
        decoder = model.config.decoder
        self._bytes_per_key = 2 * decoder.num_key_value_heads * decoder.head_dim * weight.element_size()
        self.can_verify = True

    def bytes_needed(self, start: Start) -> int:
        """See `Backend`."""
        layer_types = self.model.config.decoder.layer_types
        own = sum(_columns(self.model.config, layer_type, start.n_tokens) for layer_type in layer_types)
        in_every_layer = len(start.source_ids) + start.n_verified
        return self._bytes_per_key * (len(layer_types) * in_every_layer + start.n_rows * own)

    @torch.no_grad()
    def start(self, starts: Sequence[Start]) -> list[tuple[Held, Tensor]]:
        """See `Backend`."""
        cache, logits_BV = prefill(self.model, starts, self.device)
        return [
            (HeldTensors(self.model.config, start, cache.layers, row), logits_V)
            for row, (start, logits_V) in enumerate(zip(starts, logits_BV, strict=True))
        ]

    @torch.no_grad()
    def step(self, held: Sequence[Held], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Backend`."""
        requests = cast(Sequence[HeldTensors], held)
        n_rows = [request.n_rows for request in requests]
        positions = [request.position for request in requests for _ in range(request.n_rows)]
        keys = [StepKeys(requests, n_rows, layer) for layer in range(len(requests[0].layers))]
        input_ids = torch.tensor([token for row in tokens for token in row], device=self.device)
        x_BTD = self.model.decoder.step(
            input_ids[:, None], torch.tensor(positions, device=self.device)[:, None], keys
        )
        logits_BV: Tensor = self.model.lm_head(x_BTD)[:, 0]
        for request in requests:
            request.n_tokens += 1
        return list(torch.split_with_sizes(logits_BV, n_rows))

    @torch.no_grad()
    def verify(self, held: Held, tokens: Sequence[int]) -> Tensor:
        """See `Backend`."""
        request = cast(HeldTensors, held)
        guesses = Guesses(request, len(tokens), self.device)
        keys = [GuessedKeys(guesses, layer) for layer in request.layers]
        input_ids = torch.tensor(tokens, device=self.device)
        x_T1D = self.model.decoder.step(input_ids[:, None], guesses.positions_T[:, None], keys)
        logits_TV: Tensor = self.model.lm_head(x_T1D)[:, 0]
        return logits_TV


def _columns(config: EncoderDecoderConfig, layer_type: LayerType, n_tokens: int) -> int:
    """C: how many of a row's own keys a layer of this type has to keep."""
    reach = decoder_rule(config.decoder, layer_type).past
    return n_tokens if reach is None else min(n_tokens, reach + 1)


@dataclass(slots=True)
class HeldLayer:
    """Keys and values of one request in one layer."""

    source: KeyValues
    """[1, K, S, H]."""
    source_window: int | None
    """How many tokens back, the query included, this layer sees the source; None: all of it."""
    own: KeyValues
    """[R, K, C, H]: decoder token i in column i % C. A ring smaller than the sequence is as large as the window, so
    that a token overwrites the one that no later query sees."""
    guessed: KeyValues
    """[1, K, C, H]: tokens that are being verified, the first in column 0. Empty for a request that guesses nothing."""

    def visible_source(self, position: int) -> KeyValues:
        """What a query at this position, after the source, sees of it."""
        if self.source_window is None:
            return self.source
        first = max(0, position + 1 - self.source_window)
        return KeyValues(self.source.keys[:, :, first:], self.source.values[:, :, first:])

    def with_new(self, index: int, new: KeyValues) -> KeyValues:
        """Store decoder token `index`, [R, K, 1, H], and return what it sees, itself included."""
        n_columns = self.own.length
        column = index % n_columns
        self.own.keys[:, :, column] = new.keys[:, :, 0]
        self.own.values[:, :, column] = new.values[:, :, 0]
        n_seen = min(index + 1, n_columns)
        return self.own.first(n_seen)

    def accept(self, index: int, n: int) -> None:
        """Store the first `n` guessed tokens as decoder tokens from `index` on."""
        n_columns = self.own.length
        n_kept = min(n, n_columns)  # earlier ones would be overwritten at once
        columns = torch.arange(index + n - n_kept, index + n, device=self.own.keys.device) % n_columns
        for own_RKCH, guessed_1KCH in zip(self.own, self.guessed, strict=True):
            own_RKCH[:, :, columns] = guessed_1KCH[:, :, n - n_kept : n]


class HeldTensors:
    """`Held` as tensors, made from one row of what the decoder left in its cache after the prefix.

    Attributes:
        n_tokens: decoder tokens taken in so far.
        layers: one per decoder layer.
    """

    def __init__(
        self, config: EncoderDecoderConfig, start: Start, prefilled: Sequence[LayerCache], row: int
    ) -> None:
        self.n_source = len(start.source_ids)
        self.n_tokens = len(start.prefix_ids)
        self.n_rows = start.n_rows
        self._starts_after = self.n_source if config.decoder_positions == "continue" else 0
        self.layers = []
        for layer_type, cached in zip(config.decoder.layer_types, prefilled, strict=True):
            # The prefix stood at the right end; copied, so that the padded batch can go.
            kept = min(self.n_tokens, cached.own.length)
            indices = torch.arange(self.n_tokens - kept, self.n_tokens)
            n_columns = _columns(config, layer_type, start.n_tokens)
            window = decoder_rule(config.decoder, layer_type).past if config.window_covers_source else None
            own = []
            for given_BKSH in cached.own:
                _, n_kv_heads, _, head_dim = given_BKSH.shape
                buffer_RKCH = given_BKSH.new_zeros(start.n_rows, n_kv_heads, n_columns, head_dim)
                buffer_RKCH[:, :, indices % n_columns] = given_BKSH[row, :, given_BKSH.shape[2] - kept :]
                own.append(buffer_RKCH)
            source = (x_BKSH[row : row + 1, :, : self.n_source].clone() for x_BKSH in cached.source)
            guessed = (x_RKCH.new_zeros(1, n_kv_heads, start.n_verified, head_dim) for x_RKCH in own)
            self.layers.append(
                HeldLayer(
                    source=KeyValues(*source),
                    source_window=None if window is None else window + 1,
                    own=KeyValues(*own),
                    guessed=KeyValues(*guessed),
                )
            )

    @property
    def position(self) -> int:
        """Of the next token."""
        return self._starts_after + self.n_tokens

    @property
    def n_bytes(self) -> int:
        """See `Held`."""
        tensors = [x for layer in self.layers for x in (*layer.source, *layer.own, *layer.guessed)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def select(self, rows: Sequence[int]) -> None:
        """See `Held`."""
        index = list(rows)
        if index == list(range(self.n_rows)):
            return
        for layer in self.layers:
            if len(index) != self.n_rows:
                layer.own = KeyValues(*(buffer_RKCH[index] for buffer_RKCH in layer.own))
                continue
            used = min(self.n_tokens, layer.own.length)
            for buffer_RKCH in layer.own:
                buffer_RKCH[:, :, :used] = buffer_RKCH[index, :, :used]
        self.n_rows = len(rows)

    def accept(self, n: int) -> None:
        """See `Held`."""
        for layer in self.layers:
            layer.accept(self.n_tokens, n)
        self.n_tokens += n


class StepKeys:
    """`LayerKeys` of one layer in one step, over the requests that take part.

    Args:
        requests: in the order of the step's rows.
        n_rows: of each.
        layer: its number.
    """

    def __init__(self, requests: Sequence[HeldTensors], n_rows: list[int], layer: int) -> None:
        self._requests, self._n_rows, self._layer = requests, n_rows, layer

    def attend_own(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        """See `LayerKeys`."""
        parts = self._own_of_each(new)
        return self._attend(attention, q_BNTH, [(own,) for own in parts])

    def attend_both(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        """See `LayerKeys`."""
        return self._attend(
            attention, q_BNTH, list(zip(self._source_of_each(), self._own_of_each(new), strict=True))
        )

    def attend_source(self, attention: Attention, q_BNTH: Tensor) -> Tensor:
        """See `LayerKeys`."""
        return self._attend(attention, q_BNTH, [(source,) for source in self._source_of_each()])

    def _source_of_each(self) -> list[KeyValues]:
        return [request.layers[self._layer].visible_source(request.position) for request in self._requests]

    def _own_of_each(self, new: KeyValues) -> list[KeyValues]:
        pieces = zip(*(torch.split_with_sizes(x, self._n_rows) for x in new), strict=True)
        return [
            request.layers[self._layer].with_new(request.n_tokens, KeyValues(*piece))
            for request, piece in zip(self._requests, pieces, strict=True)
        ]

    def _attend(self, attention: Attention, q_BNTH: Tensor, parts: Sequence[tuple[KeyValues, ...]]) -> Tensor:
        """Each request's rows over its own parts."""
        queries = torch.split_with_sizes(q_BNTH[:, :, 0], self._n_rows)
        attended_BNH = torch.cat(
            [
                attend_everything(q_RNH, *seen, scale=attention.scale, softcap=attention.softcap)
                for q_RNH, seen in zip(queries, parts, strict=True)
            ]
        )
        return attention.project(attended_BNH[:, :, None])


class Guesses:
    """Tokens of one request that are verified together: where they stand, and what they do not see.

    Args:
        request: with one row.
        n_new: T.
        device: of the model.

    Attributes:
        n_new, n_before: T, and the decoder tokens before them.
        positions_T: int64 [T].
    """

    def __init__(self, request: HeldTensors, n_new: int, device: torch.device) -> None:
        self.n_new, self.n_before, self.first_position = n_new, request.n_tokens, request.position
        self.positions_T = torch.arange(request.position, request.position + n_new, device=device)
        self._n_source = request.n_source
        self._masks: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}

    def hidden(self, layer: HeldLayer) -> tuple[Tensor, Tensor]:
        """Two bool masks, True = not seen: over the decoder's own keys, those in the layer's buffer before the new
        ones, [T, C + T]; and over what `visible_source` gives for the first token, followed by these."""
        kind = (layer.own.length, layer.source_window)
        if kind not in self._masks:  # one for all layers of a type
            own = self._hidden_own(layer.own.length)
            n_seen = layer.visible_source(self.first_position).length
            source = self._hidden_source(n_seen, layer.source_window)
            self._masks[kind] = (own, torch.cat([source, own], dim=1))
        return self._masks[kind]

    def _hidden_own(self, n_columns: int) -> Tensor:
        """A buffer has as many columns as a token sees of its own, or as the whole text has tokens."""
        numbers = torch.arange(self.n_before + self.n_new, device=self.positions_T.device)
        kept, new_T = numbers[: self.n_before][-n_columns:], numbers[self.n_before :]
        by_column = torch.empty_like(kept).index_put((kept % n_columns,), kept)
        back_TS = new_T[:, None] - torch.cat([by_column, new_T])
        return (back_TS < 0) | (back_TS >= n_columns)

    def _hidden_source(self, n_seen: int, window: int | None) -> Tensor:
        if window is None:
            return self.positions_T.new_zeros(self.n_new, n_seen, dtype=torch.bool)
        first = self._n_source - n_seen
        positions_S = torch.arange(first, self._n_source, device=self.positions_T.device)
        return self.positions_T[:, None] - positions_S >= window


class GuessedKeys:
    """`LayerKeys` of one layer for tokens that are verified: rows of the step, [T, N, 1, H], which share all keys."""

    def __init__(self, guesses: Guesses, layer: HeldLayer) -> None:
        self._guesses, self._layer = guesses, layer

    def attend_own(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        """See `LayerKeys`."""
        hidden_TS, _ = self._guesses.hidden(self._layer)
        return _attend_shared(attention, q_BNTH, self._own(new), hidden_TS)

    def attend_both(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        """See `LayerKeys`."""
        _, hidden_TS = self._guesses.hidden(self._layer)
        source = self._layer.visible_source(self._guesses.first_position)
        return _attend_shared(attention, q_BNTH, (source, *self._own(new)), hidden_TS)

    def attend_source(self, attention: Attention, q_BNTH: Tensor) -> Tensor:
        """See `LayerKeys`."""
        return _attend_shared(attention, q_BNTH, (self._layer.source,), None)

    def _own(self, new: KeyValues) -> tuple[KeyValues, KeyValues]:
        """The row's own keys from before; and the new ones, put where they can be accepted from."""
        n_new, n_kept = self._guesses.n_new, min(self._guesses.n_before, self._layer.own.length)
        for guessed_1KCH, new_TK1H in zip(self._layer.guessed, new, strict=True):
            guessed_1KCH[0, :, :n_new] = new_TK1H[:, :, 0].transpose(0, 1)
        return self._layer.own.first(n_kept), self._layer.guessed.first(n_new)


def _attend_shared(
    attention: Attention, q_BNTH: Tensor, parts: Sequence[KeyValues], hidden_BS: Tensor | None
) -> Tensor:
    """Queries of one text over the same keys."""
    attended_BNH = attend_everything(
        q_BNTH[:, :, 0], *parts, scale=attention.scale, softcap=attention.softcap, hidden_BS=hidden_BS
    )
    return attention.project(attended_BNH[:, :, None])
