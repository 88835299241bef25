"""A pseudo-random order that is computed, not stored: any position of any epoch at once, in no memory."""

import numpy as np
import numpy.typing as npt

_ROUNDS = 4
_U64 = np.uint64


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit numbers, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


def keys_for(seed: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A key per number, uint64 [n]; other seeds give unrelated keys."""
    start = mix(np.asarray([seed], dtype=_U64) + _U64(0x9E3779B97F4A7C15))
    return mix(mix(numbers.astype(_U64) + _U64(1)) ^ start)


def permute(
    positions: npt.NDArray[np.int64], size: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Where a permutation of 0..size-1 takes some positions.

    A balanced Feistel network permutes the next power of 4; what falls outside `size` walks on until it is
    inside (Black and Rogaway 2002, cycle walking), fewer than four times on average.

    Args:
        positions: int64 [n], each at least 0 and below `size`.
        size: of the permutation, at least 1.
        keys: uint64 [n]; equal keys belong to the same permutation.

    Returns:
        int64 [n].
    """
    half = _U64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (_U64(1) << half) - _U64(1)
    values = positions.astype(_U64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(_ROUNDS):
            rounds = mix(right ^ mix(keys[outside] + _U64(round_number)))
            left, right = right, left ^ (rounds & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)
