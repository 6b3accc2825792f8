"""Signed codes as unsigned ones, small for small: 0, -1, 1, -2, 2 ... become 0, 1, 2, 3, 4. Their high bits are then mostly zero,
and a bit shuffle followed by zstd stores them at little more than their entropy (tools/bench/LOG.md). The fill value -128 becomes
255."""

import numpy as np
from numpy.typing import NDArray


def to_zigzag(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """uint8 of int8, same shape."""
    return ((codes << 1) ^ (codes >> 7)).view(np.uint8)


def from_zigzag(codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The inverse of `to_zigzag`."""
    return (codes >> 1).view(np.int8) ^ -(codes & 1).view(np.int8)
