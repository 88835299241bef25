"""Attention of decoding steps on the CPU, over rows of any lengths, without padding.

Every row has its own keys and values, in memory of exactly its size; rows of one request share those of the source.
They are kept in float32, in bfloat16, or in int8 with one scale for each token and head. One call stores the new
tokens' keys and values and attends, in one softmax over the source and the row's own.

The kernels are compiled by numba when first called, and kept on disk by it. Scores are computed along tokens and
values along channels, so keys are stored transposed: both inner loops run over neighbours in memory.

Letters: M new tokens of all rows, N query heads, K key-value heads, G = N / K, H head_dim, C columns (tokens that there
is room for), L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from twofold.infer.backends.base import Floats
from twofold.infer.backends.jit import FAST, STORED, StoredDtype, as_bits, exp, f32, load, pointer, softcapped

_ALONE = 400_000
"""Multiplications below which a second thread costs more than it takes over."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of what a token leaves behind."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: StoredDtype

    @property
    def bytes_per_column(self) -> int:
        """Of one token: keys and values in all layers."""
        size: int = np.dtype(STORED[self.dtype]).itemsize
        per_head = self.head_dim * size + (4 if self.dtype == "int8" else 0)
        return 2 * self.n_layers * self.n_kv_heads * per_head


class Columns:
    """Keys and values of up to C tokens in all layers.

    Attributes:
        data: [L, 2, K H C]: of each layer the keys, [K, H, C], then the values, [K, C, H].
        scales: float32 [L, 2, K C] for int8, [L, 2, 0] else.
    """

    def __init__(self, layout: Layout, n_columns: int) -> None:
        self.layout, self.n_columns = layout, n_columns
        per_layer = layout.n_kv_heads * n_columns
        self.data = np.empty((layout.n_layers, 2, per_layer * layout.head_dim), STORED[layout.dtype])
        self.scales = np.empty((layout.n_layers, 2, per_layer if layout.dtype == "int8" else 0), np.float32)

    @property
    def n_bytes(self) -> int:
        """Of memory."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def addresses(self) -> tuple[int, int]:
        """Where `data` and `scales` begin."""
        return self.data.ctypes.data, self.scales.ctypes.data

    def fill(self, layer: int, keys_KHC: Tensor, values_KCH: Tensor) -> None:
        """Store C tokens of one layer, float32."""
        for which, (x, channels) in enumerate(((keys_KHC, 1), (values_KCH, 2))):
            into = self.data[layer, which].reshape(x.shape)
            if self.layout.dtype == "float32":
                torch.from_numpy(into).copy_(x)
            elif self.layout.dtype == "bfloat16":
                torch.from_numpy(into.view(np.int16)).copy_(x.bfloat16().view(torch.int16))
            else:
                scale = x.abs().amax(dim=channels, keepdim=True) / 127.0
                torch.from_numpy(into).copy_((x / scale.clamp(min=1e-30)).round_())
                self.scales[layer, which] = scale.flatten().numpy()

    def copy_from(self, other: Columns, n_used: int) -> None:
        """The first `n_used` tokens of another row of the same size."""
        n_kv_heads, head_dim = self.layout.n_kv_heads, self.layout.head_dim
        keys = (-1, n_kv_heads, head_dim, self.n_columns)
        self.data[:, 0].reshape(keys)[..., :n_used] = other.data[:, 0].reshape(keys)[..., :n_used]
        values = (-1, n_kv_heads, self.n_columns, head_dim)
        self.data[:, 1].reshape(values)[:, :, :n_used] = other.data[:, 1].reshape(values)[:, :, :n_used]
        if self.layout.dtype == "int8":
            heads = (-1, 2, n_kv_heads, self.n_columns)
            self.scales.reshape(heads)[..., :n_used] = other.scales.reshape(heads)[..., :n_used]


SOURCE_DATA, SOURCE_SCALES, SOURCE_COLUMNS, SOURCE_FIRST = range(4)
OWN_DATA, OWN_SCALES, OWN_COLUMNS, OWN_FIRST, OWN_INDEX = range(4, 9)
"""What a step's table says of each new token: where the source's and the row's own keys and values begin, how many
columns they have, the first column that the token sees, and the column the token itself gets, the last it sees."""


def attend(
    q_MNH: Floats,
    new: tuple[Floats, Floats] | None,
    table: npt.NDArray[np.int64],
    layer: int,
    layout: Layout,
    out_MNH: Floats,
    *,
    reads_source: bool,
    scale: float,
    softcap: float | None,
) -> None:
    """Attention of M new tokens in one layer, into `out_MNH`.

    Args:
        q_MNH: float32, rotated.
        new: keys and values of the tokens, float32 [M, K, H] each, stored before anything is read; tokens of one row
            must stand in their order. None: the rows' own are not looked at.
        table: int64 [M, 9], see `SOURCE_DATA` and those after it.
        reads_source: the source is looked at; without `new` it must be.
        scale, softcap: as in `models.attention.attend`.
    """
    witness = np.empty(0, STORED[layout.dtype])
    n_seen = 0
    if reads_source:
        n_seen += int((table[:, SOURCE_COLUMNS] - table[:, SOURCE_FIRST]).sum())
    if new is not None:
        _store(*new, table, layer, witness)
        n_seen += int((table[:, OWN_INDEX] - table[:, OWN_FIRST]).sum())
    kernel = _attend_alone if n_seen * q_MNH.shape[1] * q_MNH.shape[2] < _ALONE else _attend_together
    kernel(
        len(q_MNH) * layout.n_kv_heads,
        q_MNH,
        table,
        layer,
        layout.n_kv_heads,
        reads_source,
        new is not None,
        int(layout.dtype == "int8"),
        witness,
        np.float32(scale),
        np.float32(softcap or 0.0),
        out_MNH,
    )


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Kernels called inside, from this thread, use no more than so many; None: as many as numba has."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads or before, before))
    try:
        yield
    finally:
        numba.set_num_threads(before)


# --- compiled ---------------------------------------------------------------------------------------------------------


def _store_one(stored: Any, scales: Any, start: int, step: int, place: int, x: Any) -> None:
    """x [H] into stored[start + h * step], rounded to nearest; its scale, if there is one, into scales[place]."""


@overload(_store_one, strict=False)  # type: ignore[untyped-decorator]
def _store_one_of(stored: Any, scales: Any, start: Any, step: Any, place: Any, x: Any) -> Callable[..., None]:
    if stored.dtype == types.float32:

        def store_float(stored: Any, scales: Any, start: Any, step: Any, place: Any, x: Any) -> None:
            for h in range(x.shape[0]):
                stored[start + h * step] = x[h]

        return store_float
    if stored.dtype == types.uint16:

        def store_bfloat(stored: Any, scales: Any, start: Any, step: Any, place: Any, x: Any) -> None:
            for h in range(x.shape[0]):
                bits = as_bits(x[h])
                odd = (bits >> np.uint32(16)) & np.uint32(1)
                stored[start + h * step] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return store_bfloat

    def store_int(stored: Any, scales: Any, start: Any, step: Any, place: Any, x: Any) -> None:
        largest = f32(1e-30)
        for h in range(x.shape[0]):
            largest = max(largest, abs(x[h]))
        for h in range(x.shape[0]):
            stored[start + h * step] = np.int8(round(x[h] * (f32(127.0) / largest)))
        scales[place] = largest / f32(127.0)

    return store_int


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _store(k_MKH: Any, v_MKH: Any, table: Any, layer: int, witness: Any) -> None:
    n_tokens, n_kv_heads, head_dim = k_MKH.shape
    for m in range(n_tokens):
        columns, column = table[m, OWN_COLUMNS], table[m, OWN_INDEX]
        size = n_kv_heads * columns * head_dim
        data = numba.carray(pointer(table[m, OWN_DATA]), ((layer + 1) * 2 * size,), witness.dtype)
        places = n_kv_heads * columns
        scales = numba.carray(pointer(table[m, OWN_SCALES]), ((layer + 1) * 2 * places,), np.float32)
        for head in range(n_kv_heads):
            start = layer * 2 * size + head * head_dim * columns + column
            place = layer * 2 * places + head * columns + column
            _store_one(data, scales, start, columns, place, k_MKH[m, head])
            start = (layer * 2 + 1) * size + (head * columns + column) * head_dim
            _store_one(data, scales, start, 1, place + places, v_MKH[m, head])


@numba.njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _scores(q: Any, keys: Any, columns: int, first: int, last: int, out: Any) -> None:
    """q [H] times the keys of one head, [H C], of columns first to last - 1, into `out`, [last - first]."""
    n = last - first
    out[:] = f32(0.0)
    whole = q.shape[0] // 4 * 4
    for h in range(0, whole, 4):  # slices: indices that count from their begin need no check for a sign
        start = h * columns + first
        one = keys[start : start + n]
        two = keys[start + columns : start + columns + n]
        three = keys[start + 2 * columns : start + 2 * columns + n]
        four = keys[start + 3 * columns : start + 3 * columns + n]
        a, b, c, d = q[h], q[h + 1], q[h + 2], q[h + 3]
        for s in range(n):
            out[s] += a * load(one, s) + b * load(two, s) + c * load(three, s) + d * load(four, s)
    for h in range(whole, q.shape[0]):
        start = h * columns + first
        one, a = keys[start : start + n], q[h]
        for s in range(n):
            out[s] += a * load(one, s)


@numba.njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _mix(weights: Any, values: Any, first: int, out: Any) -> None:
    """Add the values of one head, [C H], from column `first` on to `out` [H], by weight."""
    head_dim, n = out.shape[0], weights.shape[0]
    whole = n // 4 * 4
    for s in range(0, whole, 4):
        start = (first + s) * head_dim
        one, two = values[start : start + head_dim], values[start + head_dim : start + 2 * head_dim]
        start += 2 * head_dim
        three, four = values[start : start + head_dim], values[start + head_dim : start + 2 * head_dim]
        a, b, c, d = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        for h in range(head_dim):
            out[h] += a * load(one, h) + b * load(two, h) + c * load(three, h) + d * load(four, h)
    for s in range(whole, n):
        start = (first + s) * head_dim
        one, a = values[start : start + head_dim], weights[s]
        for h in range(head_dim):
            out[h] += a * load(one, h)


@numba.njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _softmax(scores: Any, softcap: Any) -> None:
    """In place, after the soft-cap if it is above 0: softcap * tanh(x / softcap)."""
    n = scores.shape[0]
    if softcap > f32(0.0):
        for s in range(n):
            scores[s] = softcapped(scores[s], softcap)
    highest = f32(-3e38)
    for s in range(n):
        highest = max(highest, scores[s])
    total = f32(0.0)
    for s in range(n):
        weight = exp(scores[s] - highest)
        scores[s] = weight
        total += weight
    if n > 0:
        factor = f32(1.0) / total
        for s in range(n):
            scores[s] *= factor


@numba.njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _attend_one(
    place: int,
    q_MNH: Any,
    table: Any,
    layer: int,
    n_kv_heads: int,
    reads_source: bool,
    reads_own: bool,
    n_scales: int,
    witness: Any,
    scale: Any,
    softcap: Any,
    out_MNH: Any,
) -> None:
    """One token and key-value head."""
    n_heads, head_dim = q_MNH.shape[1:]
    n_groups = n_heads // n_kv_heads
    m, head = place // n_kv_heads, place % n_kv_heads
    first_source = last_source = first_own = last_own = 0
    if reads_source:
        first_source, last_source = table[m, SOURCE_FIRST], table[m, SOURCE_COLUMNS]
    if reads_own:
        first_own, last_own = table[m, OWN_FIRST], table[m, OWN_INDEX] + 1
    n_source = last_source - first_source
    n_seen = n_source + last_own - first_own
    weights = np.empty(n_seen, np.float32)
    q = np.empty(head_dim, np.float32)
    mixed = np.empty(head_dim, np.float32)
    for group in range(n_groups):
        for h in range(head_dim):
            q[h] = q_MNH[m, head * n_groups + group, h] * scale
            mixed[h] = f32(0.0)
        for which in range(2):  # keys, then values
            for part in range(2):  # source, then own
                data_at, columns, first, last = (
                    table[m, SOURCE_DATA],
                    table[m, SOURCE_COLUMNS],
                    first_source,
                    last_source,
                )
                scales_at, begin = table[m, SOURCE_SCALES], 0
                if part == 1:
                    data_at, columns, first, last = (
                        table[m, OWN_DATA],
                        table[m, OWN_COLUMNS],
                        first_own,
                        last_own,
                    )
                    scales_at, begin = table[m, OWN_SCALES], n_source
                if last <= first:
                    continue
                size, places = n_kv_heads * columns * head_dim, n_kv_heads * columns
                data = numba.carray(pointer(data_at), ((layer + 1) * 2 * size,), witness.dtype)
                start = (layer * 2 + which) * size + head * columns * head_dim
                of_head = data[start : start + columns * head_dim]
                seen = weights[begin : begin + last - first]
                if which == 0:
                    _scores(q, of_head, columns, first, last, seen)
                if n_scales > 0:
                    n = (layer + 1) * 2 * places
                    scales = numba.carray(pointer(scales_at), (n,), np.float32)
                    start = (layer * 2 + which) * places + head * columns
                    seen *= scales[start + first : start + last]
                if which == 1:
                    _mix(seen, of_head, first, mixed)
            if which == 0:
                _softmax(weights, softcap)
        for h in range(head_dim):
            out_MNH[m, head * n_groups + group, h] = mixed[h]


# Two functions of two names: by its name numba's cache on disk would take the one for the other.


@numba.njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _attend_alone(n_places: int, *arguments: Any) -> None:
    for place in range(n_places):
        _attend_one(place, *arguments)


@numba.njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True, parallel=True)  # type: ignore[untyped-decorator]
def _attend_together(n_places: int, *arguments: Any) -> None:
    for place in numba.prange(n_places):
        _attend_one(place, *arguments)
