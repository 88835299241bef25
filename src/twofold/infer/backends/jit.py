"""What the kernels that numba compiles share: bits as numbers, memory by address, an exponential that vectorises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

FAST = {"reassoc", "contract", "nsz", "arcp", "nnan", "ninf"}
"""What may be done to floats: sums in any order, above all."""

f32 = np.float32

StoredDtype = Literal["float32", "bfloat16", "int8"]
"""How numbers are kept in memory; what is computed with them is float32."""

STORED: dict[StoredDtype, Any] = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
"""What the memory of each is to numpy; numba tells the three apart by it."""


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any) -> Any:
    """int64 to void*."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_bits(typing_context: Any, number: Any) -> Any:
    """The 32 bits of this float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


def load(stored: Any, i: int) -> Any:
    """stored[i] as float32: of float32, of bfloat16 as uint16, or of int8, without its scale."""


@overload(load, strict=False)  # type: ignore[untyped-decorator]
def _load_of(stored: Any, i: Any) -> Callable[..., Any]:
    if stored.dtype == types.uint16:
        return lambda stored, i: as_float(np.uint32(stored[i]) << np.uint32(16))
    return lambda stored, i: np.float32(stored[i])


@numba.njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """e^x in float32 to 3e-7, in a form that vectorises: a polynomial (Cephes' expf) times a power of two."""
    x = max(min(x, f32(88.0)), f32(-87.0))
    n = f32(math.floor(x * f32(1.44269504) + f32(0.5)))
    r = x - n * f32(0.693359375) - n * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    power = np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)
    return (p * r * r + r + f32(1.0)) * as_float(power)


@numba.njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def softcapped(x: Any, cap: Any) -> Any:
    """cap * tanh(x / cap)."""
    return cap - f32(2.0) * cap / (exp(f32(2.0) * x / cap) + f32(1.0))
