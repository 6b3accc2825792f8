"""Decodes whole shards of a unit: what training reads. The slow, obvious twin is zarr itself (`Cache.read`).

zarr takes a shard apart inner chunk by inner chunk, each through its event loop and several copies; here a shard is one object,
fetched and checked whole by the sealed store, and its chunks are decompressed into the result.
"""

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from signal_store.arrays import ArraySpec
from signal_store.shard_writer import CRC_BYTES, EMPTY


def decode_shard(data: bytes, spec: ArraySpec, rows: NDArray[np.generic]) -> None:
    """Fill `rows` [n, *row_shape] with a shard's first n rows. `data`: the whole shard, checked."""
    index_bytes = 16 * spec.chunks_per_shard
    index = np.frombuffer(data[-index_bytes - CRC_BYTES : -CRC_BYTES], dtype="<u8").reshape(-1, 2).tolist()
    view = memoryview(data)
    for chunk, (offset, length) in enumerate(index):
        part = rows[chunk * spec.chunk_rows : (chunk + 1) * spec.chunk_rows]
        if not len(part):
            return
        if (offset, length) == (EMPTY, EMPTY):
            part[...] = spec.fill
            continue
        packed = view[offset : offset + length - CRC_BYTES]
        if len(part) == spec.chunk_rows and not spec.transposed:
            blosc.decompress(packed, part)
            continue
        shape = (spec.chunk_rows, *spec.row_shape)
        whole = np.frombuffer(blosc.decompress(packed), dtype=spec.dtype).reshape(shape[::-1] if spec.transposed else shape)
        part[...] = (whole.T if spec.transposed else whole)[: len(part)]
