"""The order of the global stream: a function of (seed, epoch), never a state.

Units are permuted by a keyed Feistel network (O(1) memory); consecutive units of that order make a window; rows packed from a
window are shuffled by key. Nothing depends on the number of ranks or workers.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def key_of(*parts: int) -> int:
    """A 64-bit key of integers."""
    data = b"".join(int(part).to_bytes(8, "little", signed=True) for part in parts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def permuted(place: int, size: int, key: int) -> int:
    """The item at `place` of the keyed permutation of range(size): a balanced Feistel network, walked until inside."""
    half_bits = max(1, math.ceil(math.log2(max(2, size)) / 2))
    mask = (1 << half_bits) - 1
    value = place
    while True:
        left, right = value >> half_bits, value & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (key_of(key % 2**62, number, right) & mask)
        value = (left << half_bits) | right
        if value < size:
            return value


def shuffled(size: int, key: int) -> NDArray[np.int64]:
    """A keyed permutation of range(size), for sizes that fit in memory."""
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)
