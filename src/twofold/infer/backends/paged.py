"""The decoding step as a function of tensors of few shapes: for CUDA graphs, and to be compiled.

Keys and values lie in pages (`pages`). A step gets, for each row, its newest token, how long its texts are, and its
tables of pages; nothing in it depends on values, waits for the device or comes from the host. Rows and tables are
padded to powers of two, so that a few shapes serve all steps. On CUDA each shape is captured as a graph when first
met, and replayed from then on.

Attention gathers a row's pages and hides what the row does not see. Where the source is read in the same softmax, its
table and the row's own stand side by side. Tokens to be verified are rows like others that share a table: each layer
stores all new tokens before it attends, and each token sees those before it.

Sources and prefixes are read by the model itself, eagerly.

Letters: B rows of a step, M pages of a table, C tokens of a page, S = M C, N query heads, K key-value heads, G = N / K,
H head_dim, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twofold.infer.backends.base import Held, Start
from twofold.infer.backends.pages import SCRATCH, HeldPages, PagePool
from twofold.infer.backends.prefill import prefill
from twofold.models import DecoderCache, EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.cache import KeyValues
from twofold.models.layers import rope_frequencies, rotations
from twofold.models.masks import decoder_rule

_N_NUMBERS = 3
"""What a row brings to a step beside its tables: token, tokens before it, tokens of its source."""


class PagedBackend:
    """Runs an `EncoderDecoder` where it lies, with graphs if that is a CUDA device.

    Args:
        model: in evaluation mode.
        cache_bytes: keys and values that will be held at most; see `PagePool`.
        page_tokens: C. More waste memory in each row's last page, fewer make longer tables.
        compiles: the step goes through `torch.compile`.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        *,
        cache_bytes: int | None = None,
        page_tokens: int = 32,
        compiles: bool = False,
    ) -> None:
        self.model, self.can_verify = model, True
        decoder = model.config.decoder
        weight = model.decoder.embed_tokens.weight
        self.device = weight.device
        self.pool = PagePool(
            n_layers=decoder.num_hidden_layers,
            n_kv_heads=decoder.num_key_value_heads,
            head_dim=decoder.head_dim,
            dtype=weight.dtype,
            device=self.device,
            page_tokens=page_tokens,
            n_bytes=cache_bytes,
        )
        self._run = Step(model, self.pool)
        self._compute: Compute = torch.compile(self._run, dynamic=True) if compiles else self._run
        self._graphs: dict[Shape, Graph] = {}
        self._graphs_of = self.pool.layers[0]
        self._graph_memory: Any = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def bytes_needed(self, start: Start) -> int:
        """See `Backend`."""
        return self.pool.page_bytes * HeldPages.count(self.pool, start)

    @torch.no_grad()
    def start(self, starts: Sequence[Start]) -> list[tuple[Held, Tensor]]:
        """See `Backend`."""
        cache, logits_BV = prefill(self.model, starts, self.device)
        held = self._hold(starts, cache)
        return list(zip(held, logits_BV.unbind(), strict=True))

    @torch.no_grad()
    def step(self, held: Sequence[Held], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Backend`."""
        requests = cast(Sequence[HeldPages], held)
        for request in requests:
            request.make_room(1)
        rows = [
            Row(request, row, request.n_tokens, token)
            for request, newest in zip(requests, tokens, strict=True)
            for row, token in enumerate(newest)
        ]
        logits_BV = self._logits(rows)
        for request in requests:
            request.n_tokens += 1
        return list(torch.split_with_sizes(logits_BV, [request.n_rows for request in requests]))

    @torch.no_grad()
    def verify(self, held: Held, tokens: Sequence[int]) -> Tensor:
        """See `Backend`."""
        request = cast(HeldPages, held)
        request.make_room(len(tokens))
        return self._logits([Row(request, 0, request.n_tokens + i, token) for i, token in enumerate(tokens)])

    def _hold(self, starts: Sequence[Start], cache: DecoderCache) -> list[HeldPages]:
        """Store what the decoder left in its cache after the prefixes."""
        counts = [HeldPages.count(self.pool, start) for start in starts]
        pages = iter(self.pool.take(sum(counts)))
        held = [
            HeldPages(self.pool, start, [next(pages) for _ in range(count)])
            for start, count in zip(starts, counts, strict=True)
        ]
        n_prefix = [len(start.prefix_ids) for start in starts]
        for request, n in zip(held, n_prefix, strict=True):
            request.make_room(n)
        sources = [
            (row, np.arange(request.n_source), request.source_columns()) for row, request in enumerate(held)
        ]
        into_source = self._places(sources)
        into_own: dict[int, Places] = {}
        for data, cached in zip(self.pool.layers, cache.layers, strict=True):
            _store(data, cached.source, into_source)
            length = cached.own.length
            if length not in into_own:  # the same for all layers of a type; prefixes stand at the right end
                into_own[length] = self._places(
                    [
                        (row, np.arange(max(0, length - n), length), request.columns(max(0, n - length), n))
                        for row, (request, n) in enumerate(zip(held, n_prefix, strict=True))
                    ]
                )
            _store(data, cached.own, into_own[length])
        for request, start in zip(held, starts, strict=True):
            request.accept(len(start.prefix_ids))
            request.arrange([0] * start.n_rows)
        return held

    def _places(
        self, parts: Sequence[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = np.concatenate([np.full(len(tokens), row) for row, tokens, _ in parts])
        tokens, columns = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        rows_M, tokens_M, columns_M = (torch.from_numpy(x).to(self.device) for x in (rows, tokens, columns))
        return rows_M, tokens_M, columns_M

    def _logits(self, rows: Sequence[Row]) -> Tensor:
        """float32 [rows, V] of the tokens after these."""
        shape, numbers = _packed(rows, self.pool.page_tokens)
        inputs = torch.from_numpy(numbers)
        if self.device.type != "cuda":
            return self._compute(*shape.parts(inputs.to(self.device)))[: len(rows)]
        if self._graphs_of is not self.pool.layers[0]:  # it grew: graphs hold addresses
            self._graphs.clear()
            self._graphs_of = self.pool.layers[0]
        if shape not in self._graphs:
            self._graphs[shape] = Graph(self._compute, shape, inputs.to(self.device), self._graph_memory)
        # Graphs share memory: the next one may write where this one's logits lie.
        return self._graphs[shape].replay(inputs.pin_memory())[: len(rows)].clone()


@dataclass(frozen=True, slots=True)
class Row:
    """A token in a step."""

    request: HeldPages
    row: int
    index: int
    """Of the token in its text."""
    token: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a step's input: B, and M of its two tables."""

    n_rows: int
    n_source_pages: int
    n_own_pages: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of the three parts."""
        return [(self.n_rows, n) for n in (_N_NUMBERS, self.n_source_pages, self.n_own_pages)]

    def parts(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers [B, 3] and tables [B, M] of the source and of the text, which lie one after the other."""
        flat = torch.split_with_sizes(inputs, [math.prod(size) for size in self.sizes])
        numbers, source, own = (x.view(size) for x, size in zip(flat, self.sizes, strict=True))
        return numbers, source, own


def _packed(rows: Sequence[Row], page_tokens: int) -> tuple[Shape, npt.NDArray[np.int64]]:
    """A step's input, padded, in one piece."""
    shape = Shape(
        _power(len(rows)),
        # At least 2: to `torch.compile` 1 is a case of its own.
        _power(max(2, *(len(row.request.source) for row in rows))),
        _power(max(2, *(row.index // page_tokens + 1 for row in rows))),
    )
    numbers_B3, source_BM, own_BM = (np.zeros(size, np.int64) for size in shape.sizes)
    own_BM[len(rows) :, 0] = SCRATCH
    for i, row in enumerate(rows):
        numbers_B3[i] = row.token, row.index, row.request.n_source
        source_BM[i, : len(row.request.source)] = row.request.source
        pages = row.request.table[row.row, : shape.n_own_pages]
        own_BM[i, : len(pages)] = pages
    return shape, np.concatenate([x.ravel() for x in (numbers_B3, source_BM, own_BM)])


def _power(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


class Step:
    """The step itself, of tensors alone.

    Args:
        model: in evaluation mode.
        pool: its memory is read and written.
    """

    def __init__(self, model: EncoderDecoder, pool: PagePool) -> None:
        self._model, self._pool = model, pool
        decoder, self._config = model.config.decoder, model.config
        device = pool.layers[0].device
        self._frequencies = {
            layer_type: rope_frequencies(decoder.rope[layer_type], decoder.head_dim).to(device)
            for layer_type in dict.fromkeys(decoder.layer_types)
        }
        self._windows = {t: decoder_rule(decoder, t).past for t in self._frequencies}

    def __call__(self, numbers_BX: Tensor, source_BM: Tensor, own_BM: Tensor) -> Tensor:
        """Take in a token of each row.

        Args:
            numbers_BX: int64 [B, 3]: token, tokens before it in its text, tokens of the source.
            source_BM: int64 [B, M], pages of the source.
            own_BM: int64 [B, M], of the text; the token's own place is there too.

        Returns:
            float32 [B, V], logits of the token after it.
        """
        ids_B, index_B, n_source_B = numbers_BX.unbind(1)
        positions_B = index_B + n_source_B if self._config.decoder_positions == "continue" else index_B
        size = self._pool.page_tokens
        page_B = own_BM.gather(1, (index_B // size)[:, None])[:, 0]
        column_B = page_B * size + index_B % size
        views = {
            layer_type: self._view(past, index_B, positions_B, n_source_B, source_BM, own_BM)
            for layer_type, past in self._windows.items()
        }
        keys = [
            PagedKeys(data, column_B, views[layer_type])
            for data, layer_type in zip(self._pool.layers, self._config.decoder.layer_types, strict=True)
        ]
        positions_B1 = positions_B[:, None]
        rope = {t: rotations(frequencies, positions_B1) for t, frequencies in self._frequencies.items()}
        x_B1D = self._model.decoder.step(ids_B[:, None], positions_B1, keys, rope)
        logits_BV: Tensor = self._model.lm_head(x_B1D)[:, 0]
        return logits_BV

    def _view(
        self,
        past: int | None,
        index_B: Tensor,
        positions_B: Tensor,
        n_source_B: Tensor,
        source_BM: Tensor,
        own_BM: Tensor,
    ) -> View:
        """What the layers of a type see, whose window reaches `past` tokens back."""
        size = self._pool.page_tokens
        source_S = torch.arange(source_BM.shape[1] * size, device=source_BM.device)
        own_S = torch.arange(own_BM.shape[1] * size, device=own_BM.device)
        hidden_own_BS = own_S > index_B[:, None]
        if past is not None:
            hidden_own_BS = hidden_own_BS | (own_S < (index_B - past)[:, None])
        if self._config.layout != "merged":
            # Where there is no source, one zero from the empty page is seen: a softmax over nothing is no number.
            hidden_source_BS = source_S >= n_source_B.clamp(min=1)[:, None]
            return View(own=(own_BM, hidden_own_BS), source=(source_BM, hidden_source_BS))
        hidden_source_BS = source_S >= n_source_B[:, None]
        if past is not None and self._config.window_covers_source:
            hidden_source_BS = hidden_source_BS | (source_S < (positions_B - past)[:, None])
        both = torch.cat([source_BM, own_BM], dim=1), torch.cat([hidden_source_BS, hidden_own_BS], dim=1)
        return View(both=both)


Seen = tuple[Tensor, Tensor]
"""A table of pages, int64 [B, M], and which of their tokens are hidden, bool [B, S]."""


@dataclass(frozen=True)
class View:
    """What layers of one type see; the separate layout has the first two, the merged one the third."""

    own: Seen | None = None
    source: Seen | None = None
    both: Seen | None = None


@dataclass(frozen=True)
class PagedKeys:
    """`LayerKeys` of one layer in one step."""

    data: Tensor
    """[2, K, P, C, H]: the layer's pages."""
    column_B: Tensor
    """int64: where the new tokens are put, counted in tokens over all pages."""
    view: View

    def attend_own(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        """See `LayerKeys`."""
        _put(self.data, self.column_B, torch.stack(new)[:, :, :, 0].transpose(1, 2))
        return self._attend(attention, q_BNTH, self.view.own)

    def attend_both(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        """See `LayerKeys`."""
        _put(self.data, self.column_B, torch.stack(new)[:, :, :, 0].transpose(1, 2))
        return self._attend(attention, q_BNTH, self.view.both)

    def attend_source(self, attention: Attention, q_BNTH: Tensor) -> Tensor:
        """See `LayerKeys`."""
        return self._attend(attention, q_BNTH, self.view.source)

    def _attend(self, attention: Attention, q_BNTH: Tensor, seen: Seen | None) -> Tensor:
        assert seen is not None
        attended_BNH = attend_pages(
            q_BNTH[:, :, 0], self.data, *seen, scale=attention.scale, softcap=attention.softcap
        )
        return attention.project(attended_BNH[:, :, None])


def attend_pages(
    q_BNH: Tensor, data: Tensor, table_BM: Tensor, hidden_BS: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """Attention of one query in each row over the row's pages.

    Args:
        q_BNH: rotated.
        data: [2, K, P, C, H], keys and values; all finite.
        table_BM: int64, pages.
        hidden_BS: bool, True = not to be seen; each query must be left a key.
        scale, softcap: as in `models.attention.attend`.

    Returns:
        [B, N, H] in the dtype of q.
    """
    n_rows, n_heads, head_dim = q_BNH.shape
    n_kv_heads = data.shape[1]
    gathered = data.index_select(2, table_BM.flatten())
    k_KBSH, v_KBSH = gathered.view(2, n_kv_heads, *hidden_BS.shape, head_dim).unbind()
    q_KBGH = q_BNH.view(n_rows, n_kv_heads, n_heads // n_kv_heads, head_dim).transpose(0, 1)
    scores_KBGS = (q_KBGH @ k_KBSH.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores_KBGS = softcap * torch.tanh(scores_KBGS / softcap)
    scores_KBGS = scores_KBGS.masked_fill(hidden_BS[:, None], -torch.inf)
    out_KBGH = scores_KBGS.softmax(dim=-1).to(q_BNH.dtype) @ v_KBSH
    return out_KBGH.transpose(0, 1).reshape(n_rows, n_heads, head_dim)


def _put(data: Tensor, columns: Tensor, new: Tensor) -> None:
    """Store keys and values of M tokens, [2, K, M, H], in the columns int64 [M] of a layer."""
    data.view(*data.shape[:2], -1, data.shape[-1]).index_copy_(2, columns, new)


Places = tuple[Tensor, Tensor, Tensor]
"""Of M tokens, int64 [M] each: batch row and column where they stand, and the column of the pages where they go."""


def _store(data: Tensor, cached: KeyValues, places: Places) -> None:
    """Tokens of a padded batch into a layer's pages."""
    rows_M, tokens_M, columns_M = places
    x_2BKSH = torch.stack(cached)
    _put(data, columns_M, x_2BKSH.transpose(1, 2)[:, :, rows_M, tokens_M])


Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""See `Step.__call__`."""


class Graph:
    """A step of one shape, captured on a CUDA device.

    Args:
        compute: what is captured.
        shape: of the input.
        inputs: a real step's, on the device; the step is taken on the way.
        memory: shared by all graphs, of which no two run at once.
    """

    def __init__(self, compute: Compute, shape: Shape, inputs: Tensor, memory: Any) -> None:
        self._inputs = inputs
        parts = shape.parts(inputs)
        current = torch.cuda.current_stream(inputs.device)
        stream: torch.cuda.Stream = torch.cuda.Stream(inputs.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        # Once outside: libraries set themselves up, and `torch.compile` compiles, with calls no graph may hold.
        with torch.cuda.stream(stream):
            compute(*parts)
        self._graph = torch.cuda.CUDAGraph()
        # A stream of the model's device, whichever is the thread's own; other threads may use it meanwhile.
        with torch.cuda.graph(self._graph, memory, stream, capture_error_mode="thread_local"):
            self._logits_BV = compute(*parts)
        current.wait_stream(stream)

    def replay(self, inputs: Tensor) -> Tensor:
        """Logits for an input of the same shape, which lies on the host, pinned. Valid until a graph runs again."""
        self._inputs.copy_(inputs, non_blocking=True)
        self._graph.replay()
        return self._logits_BV
