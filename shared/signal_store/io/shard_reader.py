"""Decodes whole shards of a unit: what training reads. The slow, obvious twin is zarr itself (`Cache.read`).

zarr takes a shard apart inner chunk by inner chunk, each through its event loop and several copies; here a shard is one object,
fetched and checked whole by the sealed store, and its chunks are decompressed into the result.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from signal_store.format.arrays import ArraySpec
from signal_store.io.shard_writer import CRC_BYTES, EMPTY


def decode_shards(shards: Sequence[memoryview], spec: ArraySpec, rows: int) -> NDArray[Any]:
    """The first rows [rows, *row_shape] of shards that follow each other. `shards`: whole ones, checked."""
    found = np.empty((rows, *spec.row_shape), dtype=spec.dtype)
    for number, data in enumerate(shards):
        _decode(data, spec, found[number * spec.shard_rows : (number + 1) * spec.shard_rows])
    return found


def _decode(data: memoryview, spec: ArraySpec, rows: NDArray[np.generic]) -> None:
    index_bytes = 16 * spec.chunks_per_shard
    index = np.frombuffer(data[-index_bytes - CRC_BYTES : -CRC_BYTES], dtype="<u8").reshape(-1, 2).tolist()
    for chunk, (offset, length) in enumerate(index):
        part = rows[chunk * spec.chunk_rows : (chunk + 1) * spec.chunk_rows]
        if not len(part):
            return
        if (offset, length) == (EMPTY, EMPTY):
            part[...] = spec.fill
            continue
        packed = data[offset : offset + length - CRC_BYTES]
        if len(part) == spec.chunk_rows and not spec.transposed:
            blosc.decompress(packed, part)
            continue
        shape = (spec.chunk_rows, *spec.row_shape)
        whole = np.frombuffer(blosc.decompress(packed), dtype=spec.dtype).reshape(shape[::-1] if spec.transposed else shape)
        part[...] = (whole.T if spec.transposed else whole)[: len(part)]
