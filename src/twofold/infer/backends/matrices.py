"""Linear layers over few tokens on the CPU, at the speed at which the memory can be read.

A decoding step is over when its matrices have been read, so they are read once, in the order in which they lie there,
one row after another: several streams at once are slower. They are kept in float32 (in the model's own memory), in
bfloat16, or in int8 with one scale for each output; inputs, products, sums and outputs are float32, so that nothing but
the weights is ever rounded.

The kernels are compiled by numba when first called, and kept on disk by it.

Letters: M tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from twofold.infer.backends.base import Floats
from twofold.infer.backends.jit import STORED, StoredDtype, f32, load, pointer, softcapped
from twofold.infer.backends.rounding import int8_rows

WEIGHTS, SCALES, BIAS, OUTPUTS = range(4)
"""What a table says of each matrix: where its weights begin, its scales and biases (0: none), and its rows."""


class Matrices:
    """Linear layers that read the same inputs, one after another in the outputs.

    Args:
        modules: each [O_i, I].
        format: how the weights are kept. `float32` weights stay where they are: what is changed in place there, is
            changed here.
        softcap: outputs become softcap * tanh(x / softcap); None: they stay.

    Attributes:
        n_outputs: of all of them.
    """

    def __init__(
        self, modules: Sequence[nn.Linear], format: StoredDtype, *, softcap: float | None = None
    ) -> None:
        self._witness = np.empty(0, STORED[format])
        self._softcap = np.float32(softcap or 0.0)
        self._kept: list[npt.NDArray[Any]] = []
        rows = []
        for module in modules:
            weights, scales = _stored(module.weight, format)
            bias = None if module.bias is None else module.bias.detach().float().numpy()
            rows.append(
                [self._address(weights), self._address(scales), self._address(bias), module.out_features]
            )
        self._table = np.array(rows, np.int64)
        self.n_outputs = int(self._table[:, OUTPUTS].sum())

    def multiply(self, x_MI: Floats, out_MO: Floats) -> None:
        """Into `out_MO`, float32 [M, n_outputs]."""
        _multiply(x_MI, self._table, self._witness, self._softcap, out_MO)

    def _address(self, array: npt.NDArray[Any] | None) -> int:
        if array is None:
            return 0
        self._kept.append(array)
        return array.ctypes.data


def _stored(weight: Tensor, format: StoredDtype) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Contiguous weights, and scales where the format has them."""
    weight = weight.detach()
    if format == "float32":
        return weight.float().contiguous().numpy(), None
    if format == "bfloat16":
        return weight.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16), None
    rounded, scale = int8_rows(weight)
    return rounded.contiguous().numpy(), scale.flatten().contiguous().numpy()


# --- compiled ---------------------------------------------------------------------------------------------------------

_SUMS = {"reassoc", "contract", "nsz"}
"""Sums in any order; what is no number stays none, so that broken weights are seen in the logits."""

_BLOCK = 32
"""Outputs that one thread computes at a time: their weights stay in its cache until all tokens had them."""


@numba.njit(fastmath=_SUMS, error_model="numpy")  # type: ignore[untyped-decorator]
def _one(weights: Any, n: int, first: int, last: int, x: Any, out: Any) -> None:
    """Rows first to last - 1 of a matrix times one token, x [I], into out [1, last - first]."""
    for o in range(first, last):
        # A slice: indices that count from their begin need no check for a sign.
        w = weights[o * n : (o + 1) * n]
        a = f32(0.0)
        for i in range(n):
            a += load(w, i) * x[i]
        out[0, o - first] = a


@numba.njit(fastmath=_SUMS, error_model="numpy")  # type: ignore[untyped-decorator]
def _two(weights: Any, n: int, first: int, last: int, x0: Any, x1: Any, out: Any) -> None:
    """The same for two tokens, into out [2, last - first]."""
    for o in range(first, last):
        w = weights[o * n : (o + 1) * n]
        a0 = a1 = f32(0.0)
        for i in range(n):
            a = load(w, i)
            a0 += a * x0[i]
            a1 += a * x1[i]
        out[0, o - first], out[1, o - first] = a0, a1


@numba.njit(fastmath=_SUMS, error_model="numpy")  # type: ignore[untyped-decorator]
def _finish(sums: Any, entry: Any, first: int, softcap: Any, out: Any) -> None:
    """Scales, biases and soft-cap of the outputs from `first` on, from sums [O] into out [O]."""
    n, n_outputs = sums.shape[0], entry[OUTPUTS]
    if entry[SCALES] != 0:
        scales = numba.carray(pointer(entry[SCALES]), (n_outputs,), np.float32)[first : first + n]
        for o in range(n):
            sums[o] *= scales[o]
    if entry[BIAS] != 0:
        bias = numba.carray(pointer(entry[BIAS]), (n_outputs,), np.float32)[first : first + n]
        for o in range(n):
            sums[o] += bias[o]
    if softcap > f32(0.0):
        for o in range(n):
            # The difference is 0, or no number where there was none.
            sums[o] = softcapped(sums[o], softcap) + (sums[o] - sums[o])
    for o in range(n):
        out[o] = sums[o]


@numba.njit(fastmath=_SUMS, error_model="numpy")  # type: ignore[untyped-decorator]
def _multiply_block(block: int, x_MI: Any, table: Any, witness: Any, softcap: Any, out_MO: Any) -> None:
    """One block of the outputs, counted through all matrices."""
    n_tokens, n = x_MI.shape
    matrix = column = 0
    n_blocks = (table[0, OUTPUTS] + _BLOCK - 1) // _BLOCK
    while block >= n_blocks:
        block -= n_blocks
        column += table[matrix, OUTPUTS]
        matrix += 1
        n_blocks = (table[matrix, OUTPUTS] + _BLOCK - 1) // _BLOCK
    entry = table[matrix]
    first = block * _BLOCK
    last = min(entry[OUTPUTS], first + _BLOCK)
    column += first
    weights = numba.carray(pointer(entry[WEIGHTS]), (entry[OUTPUTS] * n,), witness.dtype)
    sums = np.empty((2, last - first), np.float32)
    for m in range(0, n_tokens, 2):
        if m + 1 == n_tokens:
            _one(weights, n, first, last, x_MI[m], sums)
        else:
            _two(weights, n, first, last, x_MI[m], x_MI[m + 1], sums)
        for i in range(min(2, n_tokens - m)):
            _finish(sums[i], entry, first, softcap, out_MO[m + i, column : column + last - first])


@numba.njit(fastmath=_SUMS, error_model="numpy", nogil=True, cache=True, parallel=True)  # type: ignore[untyped-decorator]
def _multiply(x_MI: Any, table: Any, witness: Any, softcap: Any, out_MO: Any) -> None:
    n_blocks = 0
    for matrix in range(table.shape[0]):
        n_blocks += (table[matrix, OUTPUTS] + _BLOCK - 1) // _BLOCK
    for block in numba.prange(n_blocks):
        _multiply_block(np.int64(block), x_MI, table, witness, softcap, out_MO)
