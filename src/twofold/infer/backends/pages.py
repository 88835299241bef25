"""Keys and values in pages of equal size, so that running requests share one block of memory whose place is fixed.

A page holds a few neighbouring tokens of one text in all layers. A request gets pages for its source, once, and for
each of its rows, and a table says which page holds which tokens. What a request takes is then a sum over its parts,
rounded up to pages, whatever else runs beside it. There are no rings: sliding layers hold what they no longer see.

Rows of a request share pages that are full, as those are never written again: a beam that branches copies no more than
the page it is writing to.

Letters: L layers, K key-value heads, P pages, C tokens of a page, H head_dim, R rows of a request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twofold.infer.backends.base import Start

EMPTY = 0
"""The page that stands where a table has none: zeros, never written."""

SCRATCH = 1
"""The page that rows without a text write to."""

_N_RESERVED = 2


class PagePool:
    """The memory, which grows by doubling.

    Args:
        n_layers, n_kv_heads, head_dim, dtype, device: of the decoder.
        page_tokens: C.
        n_bytes: what the pool should hold in the end: an eighth at first, and it doubles no further. It grows beyond
            where more is taken. None: it doubles as needed.

    Attributes:
        layers: L of [2, K, P, C, H], keys then values; other tensors after each growth.
        page_bytes: of a page in all layers.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_tokens: int,
        n_bytes: int | None = None,
    ) -> None:
        if page_tokens < 1:
            raise ValueError(f"page_tokens must be at least 1, got {page_tokens}")
        self.page_tokens = page_tokens
        self.page_bytes = 2 * n_layers * n_kv_heads * page_tokens * head_dim * dtype.itemsize
        self._most = None if n_bytes is None else n_bytes // self.page_bytes
        self._free: list[int] = []
        shape = (2, n_kv_heads, _N_RESERVED, page_tokens, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        if self._most is not None:
            self._grow(self._most // 8)

    @property
    def n_pages(self) -> int:
        """P, without those that stand for none."""
        return self.layers[0].shape[2] - _N_RESERVED

    @property
    def n_taken(self) -> int:
        """Pages that requests hold."""
        return self.n_pages - len(self._free)

    def pages_for(self, n_tokens: int) -> int:
        """How many it takes."""
        return -(-n_tokens // self.page_tokens)

    def take(self, n: int) -> list[int]:
        """The numbers of `n` pages, filled with zeros: what is hidden from a query is still multiplied by 0, and must
        be finite for that, whatever the last owner left."""
        if n > len(self._free):
            doubled = max(2 * self.n_pages, 1)
            most = doubled if self._most is None else min(doubled, self._most)
            self._grow(max(self.n_taken + n, most))
        taken = [self._free.pop() for _ in range(n)]
        if taken:
            index = self._index(taken)
            for layer in self.layers:
                layer.index_fill_(2, index, 0.0)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back, from any thread."""
        self._free.extend(pages)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Whole pages onto others, in all layers."""
        from_pages, to_pages = self._index(sources), self._index(targets)
        for layer in self.layers:
            layer.index_copy_(2, to_pages, layer.index_select(2, from_pages))

    def _grow(self, n_pages: int) -> None:
        """Layer by layer, so that no more than one lies there twice."""
        n_before = self.n_pages
        for i, layer in enumerate(self.layers):
            added = layer.new_zeros(*layer.shape[:2], n_pages - n_before, *layer.shape[3:])
            self.layers[i] = torch.cat([layer, added], dim=2)
        self._free.extend(range(_N_RESERVED + n_pages - 1, _N_RESERVED + n_before - 1, -1))

    def _index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(pages, device=self.layers[0].device)


class HeldPages:
    """`Held`: the pages of one request. It starts with one row, before anything is stored.

    Args:
        pool: where its pages come from, and go when it is forgotten.
        start: what it will hold.
        pages: `count(pool, start)` of them.

    Attributes:
        source: pages of the source.
        table: int64 [R, pages of a row]; `EMPTY` where nothing is stored yet.
        n_source: tokens of the source.
        n_tokens: decoder tokens taken in so far.
    """

    def __init__(self, pool: PagePool, start: Start, pages: Sequence[int]) -> None:
        self._pool = pool
        self.n_source = len(start.source_ids)
        n_source_pages = pool.pages_for(self.n_source)
        self.source, self._own = list(pages[:n_source_pages]), list(pages[n_source_pages:])
        self._spare = list(self._own)
        self._pages_per_row = _pages_per_row(pool, start)
        self.table = np.full((1, self._pages_per_row), EMPTY, np.int64)
        self.n_tokens = 0
        self._n_pages = 0

    @staticmethod
    def count(pool: PagePool, start: Start) -> int:
        """Pages that a request takes."""
        return pool.pages_for(len(start.source_ids)) + start.n_rows * _pages_per_row(pool, start)

    def __del__(self) -> None:
        self._pool.release(self.source)
        self._pool.release(self._own)

    @property
    def n_rows(self) -> int:
        """R."""
        return len(self.table)

    @property
    def n_bytes(self) -> int:
        """See `Held`."""
        return self._pool.page_bytes * (len(self.source) + len(self._own))

    def make_room(self, n_new: int) -> int:
        """Pages for as many tokens more in each row, once. Returns how many each row has now."""
        n_needed = self._pool.pages_for(self.n_tokens + n_new)
        assert n_needed <= self._pages_per_row
        while self._n_pages < n_needed:
            for row in range(self.n_rows):
                self.table[row, self._n_pages] = self._spare.pop()
            self._n_pages += 1
        return n_needed

    def columns(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Where tokens `first` to `last - 1` of the first row lie, counted in tokens over all pages."""
        return self._columns(self.table[0], first, last)

    def source_columns(self) -> npt.NDArray[np.int64]:
        """Likewise for the source."""
        return self._columns(np.array(self.source, np.int64), 0, self.n_source)

    def select(self, rows: Sequence[int]) -> None:
        """See `Held`. Only pages that two rows would write to are copied."""
        if list(rows) != list(range(self.n_rows)):
            self.arrange(rows)

    def arrange(self, parents: Sequence[int]) -> None:
        """`select`, which may also make more rows than there are, up to those that the request asked for."""
        n_used = self._pool.pages_for(self.n_tokens)
        table = np.full((len(parents), self._pages_per_row), EMPTY, np.int64)
        table[:, :n_used] = self.table[list(parents), :n_used]
        in_use = set(table[:, :n_used].ravel().tolist())
        spare = [page for page in self._own if page not in in_use]
        n_too_many = len(self._own) - len(parents) * self._pages_per_row
        if n_too_many > 0:
            self._pool.release(spare[:n_too_many])
            spare = spare[n_too_many:]
        elif n_too_many < 0:
            spare += self._pool.take(-n_too_many)
        self._own, self._spare = [*in_use, *spare], spare
        self.table, self._n_pages = table, n_used
        if self.n_tokens % self._pool.page_tokens:
            self._part(parents)

    def accept(self, n: int) -> None:
        """See `Held`."""
        self.n_tokens += n

    def _part(self, parents: Sequence[int]) -> None:
        """Rows of one parent go on in pages of their own."""
        newest = self._n_pages - 1
        sources, targets = [], []
        for row, parent in enumerate(parents):
            if parent in parents[:row]:
                sources.append(int(self.table[row, newest]))
                targets.append(self._spare.pop())
                self.table[row, newest] = targets[-1]
        if sources:
            self._pool.copy(sources, targets)

    def _columns(self, pages: npt.NDArray[np.int64], first: int, last: int) -> npt.NDArray[np.int64]:
        index, size = np.arange(first, last), self._pool.page_tokens
        found: npt.NDArray[np.int64] = pages[index // size] * size + index % size
        return found


def _pages_per_row(pool: PagePool, start: Start) -> int:
    return pool.pages_for(start.n_tokens + start.n_verified)
