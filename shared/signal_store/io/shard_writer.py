"""Streams the rows of one unit of one array into its shards: inner chunk by inner chunk, the index last.

zarr itself holds about three times a raw shard in memory when it writes one; this holds one inner chunk. The bytes are
those that zarr writes (a test compares them), so any zarr reader reads them.
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Self

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from signal_store.format.arrays import ArraySpec
from signal_store.io.objects import Objects

EMPTY = 2**64 - 1
CRC_BYTES = 4
_SHUFFLE = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
_compressing = threading.Lock()


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What the ledger remembers of one shard: its length, its sha256, the crc32c of its index and of each inner chunk
    (None for a chunk that holds nothing)."""

    length: int
    sha256: str
    index_crc32c: int
    chunk_crc32c: tuple[int | None, ...]


def crc32c(data: bytes | memoryview) -> int:
    """The CRC-32C of bytes."""
    return int(google_crc32c.value(np.frombuffer(memoryview(data).toreadonly(), np.uint8)))  # a memoryview it would refuse


@contextlib.contextmanager
def _one_blosc_thread() -> Iterator[None]:
    """Blosc compresses in the caller's thread: several threads write other bytes each time. Its switch is the process's, so it is
    put back at once."""
    with _compressing:
        before = blosc.use_threads
        blosc.use_threads = False
        try:
            yield
        finally:
            blosc.use_threads = before


def encode_chunk(rows: NDArray[np.generic], spec: ArraySpec) -> tuple[bytes, int]:
    """The stored bytes of one inner chunk (transposed if so specified, blosc, crc32c little-endian) and that crc32c."""
    raw = np.ascontiguousarray(rows.T if spec.transposed else rows)
    with _one_blosc_thread():
        packed = blosc.compress(raw, b"zstd", spec.level, _SHUFFLE[spec.shuffle], 0, raw.dtype.itemsize)
    crc = crc32c(packed)
    return bytes(packed) + crc.to_bytes(CRC_BYTES, "little"), crc


@dataclass(slots=True)
class _OpenShard:
    file: BinaryIO
    hash: "hashlib._Hash"
    position: int = 0
    index: list[tuple[int, int]] = field(default_factory=list)
    crcs: list[int | None] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)


class UnitArrayWriter:
    """Writes one unit's rows of one array as whole shards below `prefix`.

    Rows are appended in order; what is missing at the end is filled. `close` returns the shards' records. Used as a context
    manager it closes its file when the block is left in any way.
    """

    def __init__(self, objects: Objects, prefix: str, spec: ArraySpec, unit: int) -> None:
        self._objects, self._prefix, self._spec = objects, prefix, spec
        self._first_shard = unit * spec.shards_per_unit
        self._pending: list[NDArray[np.generic]] = []
        self._pending_rows = 0
        self._rows = 0
        self._shard: _OpenShard | None = None
        self._records: list[ShardRecord] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def append(self, rows: NDArray[np.generic]) -> None:
        """Add rows [n, *row_shape] of the array's dtype."""
        if rows.dtype != np.dtype(self._spec.dtype) or rows.shape[1:] != self._spec.row_shape:
            raise AssertionError(f"{self._spec.path}: rows {rows.dtype}{rows.shape}, spec {self._spec.dtype}{self._spec.row_shape}")
        self._rows += len(rows)
        if self._rows > self._spec.capacity_rows:
            raise AssertionError(f"{self._spec.path}: {self._rows} rows, capacity {self._spec.capacity_rows}")
        self._pending.append(rows)
        self._pending_rows += len(rows)
        if self._pending_rows >= self._spec.chunk_rows:
            joined = np.concatenate(self._pending) if len(self._pending) > 1 else rows
            whole = len(joined) - len(joined) % self._spec.chunk_rows
            for first in range(0, whole, self._spec.chunk_rows):
                self._write_chunk(joined[first : first + self._spec.chunk_rows])
            self._pending, self._pending_rows = [joined[whole:]], len(joined) - whole

    def close(self) -> tuple[ShardRecord, ...]:
        """Fill up, write the last index, and return one record per shard of the unit."""
        if self._pending_rows:
            filler = np.full((self._spec.chunk_rows - self._pending_rows, *self._spec.row_shape), self._spec.fill)
            self._write_chunk(np.concatenate([*self._pending, filler]))
            self._pending, self._pending_rows = [], 0
        while len(self._records) < self._spec.shards_per_unit:
            self._write_chunk(None)
        return tuple(self._records)

    def _write_chunk(self, rows: NDArray[np.generic] | None) -> None:
        if self._shard is None:
            key = f"{self._prefix}/{self._spec.shard_key(self._first_shard + len(self._records))}"
            self._shard = _OpenShard(self._stack.enter_context(self._objects.stream(key)), hashlib.sha256())
        shard = self._shard
        if rows is None or _holds_nothing(rows, self._spec.fill):
            shard.index.append((EMPTY, EMPTY))
            shard.crcs.append(None)
        else:
            data, crc = encode_chunk(rows, self._spec)
            shard.index.append((shard.position, len(data)))
            shard.crcs.append(crc)
            shard.write(data)
        if len(shard.index) == self._spec.chunks_per_shard:
            self._finish_shard(shard)

    def _finish_shard(self, shard: _OpenShard) -> None:
        index = np.asarray(shard.index, dtype="<u8").tobytes()
        crc = crc32c(index)
        shard.write(index + crc.to_bytes(CRC_BYTES, "little"))
        self._stack.close()
        self._records.append(ShardRecord(shard.position, "sha256:" + shard.hash.hexdigest(), crc, tuple(shard.crcs)))
        self._shard = None


def _holds_nothing(rows: NDArray[np.generic], fill: np.generic) -> bool:
    return bool(np.isnan(rows).all() if rows.dtype.kind == "f" else (rows == fill).all())


def write_unit_array(
    objects: Objects, prefix: str, spec: ArraySpec, unit: int, rows: NDArray[np.generic]
) -> tuple[ShardRecord, ...]:
    """All rows of a unit at once."""
    with UnitArrayWriter(objects, prefix, spec, unit) as writer:
        writer.append(rows)
        return writer.close()
