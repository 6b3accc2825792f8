"""The reader's store: a zarr store that compares what it fetched with what was committed.

Stock zarr reads a missing, swapped, stale or zero-length shard without a word. This wrapper checks the same bytes zarr asks
for (a shard's index, an inner chunk, a zarr.json) against the seal and the packed records; nothing extra is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from signal_store.canonical import sha256
from signal_store.errors import CorruptError
from signal_store.seal_record import ABSENT, Seal, group_of
from signal_store.shard_writer import CRC_BYTES, crc32c


@dataclass(frozen=True, slots=True)
class ShardChecks:
    """The packed records of one array: rows are shards."""

    length: NDArray[np.uint64]
    index_crc32c: NDArray[np.uint64]
    chunk_crc32c: NDArray[np.uint64]


class SealedStore(WrapperStore[Store]):
    """Read-only view of a sealed cache; raises CorruptError, naming the object, where bytes are not the committed ones."""

    def __init__(self, store: Store, seal: Seal | None = None, checks: Mapping[str, ShardChecks] | None = None) -> None:
        super().__init__(store)
        self._seal = seal
        self._checks = dict(checks or {})
        self._extents: dict[str, dict[tuple[int, int], int]] = {}

    def _with_store(self, store: Store) -> "SealedStore":
        return SealedStore(store, self._seal, self._checks)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Fetch and check; see the class."""
        assert self._seal is not None
        if key.endswith("zarr.json"):
            return await self._whole(key, prototype, byte_range, self._seal.metadata.get(key))
        if key in self._seal.constants:
            return await self._whole(key, prototype, byte_range, self._seal.constants[key])
        path, _, place = key.partition("/c/")
        if path not in self._checks or not place:
            return None
        shard = int(place.split("/")[0])
        buffer = await self._store.get(key, prototype, byte_range)
        if buffer is None or len(buffer) == 0:
            raise corrupt(key, "a committed object is gone or empty")
        data = buffer.to_bytes()
        if isinstance(byte_range, SuffixByteRequest):
            self._check_index(key, data, self._checks[path], shard)
        elif isinstance(byte_range, RangeByteRequest):
            self._check_chunk(key, data, (byte_range.start, byte_range.end), self._checks[path], shard)
        elif byte_range is None:
            self._check_shard(key, data, self._checks[path], shard)
        else:
            raise AssertionError(f"{key}: unexpected {byte_range}")
        return buffer

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges) -> list[Buffer | None]:  # type: ignore[no-untyped-def]
        """Each range on its own, through the checks of `get`."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _whole(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, expected: str | None
    ) -> Buffer | None:
        buffer = await self._store.get(key, prototype)
        if expected is None:
            return None  # zarr asks for keys that may not exist, such as another version's metadata
        if buffer is None:
            raise corrupt(key, "a committed object is gone")
        found = sha256(buffer.to_bytes())
        if found != expected:
            raise corrupt(key, "an object was altered", expected, found)
        return buffer[_slice(byte_range, len(buffer))]

    def _check_index(self, key: str, data: bytes, checks: ShardChecks, shard: int) -> None:
        expected, found = int(checks.index_crc32c[shard]), crc32c(data[:-CRC_BYTES])
        if expected != found:
            raise corrupt(key, "a shard's index is not the committed one", expected, found)
        extents = np.frombuffer(data[:-CRC_BYTES], dtype="<u8").reshape(-1, 2)
        self._extents[key] = {
            (int(start), int(start + length)): chunk for chunk, (start, length) in enumerate(extents) if length != ABSENT
        }

    def _check_chunk(self, key: str, data: bytes, extent: tuple[int, int], checks: ShardChecks, shard: int) -> None:
        chunk = self._extents.get(key, {}).get(extent)
        if chunk is None:
            raise corrupt(key, "a read that follows no committed index", found=extent)
        expected, found = int(checks.chunk_crc32c[shard, chunk]), crc32c(data[:-CRC_BYTES])
        if expected != found or data[-CRC_BYTES:] != found.to_bytes(CRC_BYTES, "little"):
            raise corrupt(key, f"inner chunk {chunk} is not the committed one", expected, found)

    def _check_shard(self, key: str, data: bytes, checks: ShardChecks, shard: int) -> None:
        if len(data) != int(checks.length[shard]):
            raise corrupt(key, "a shard has another length than committed", int(checks.length[shard]), len(data))
        index_bytes = 16 * checks.chunk_crc32c.shape[1] + CRC_BYTES
        self._check_index(key, data[-index_bytes:], checks, shard)
        for start, end in self._extents[key]:
            self._check_chunk(key, data[start:end], (start, end), checks, shard)


def _slice(byte_range: ByteRequest | None, length: int) -> slice:
    if isinstance(byte_range, RangeByteRequest):
        return slice(byte_range.start, byte_range.end)
    if isinstance(byte_range, OffsetByteRequest):
        return slice(byte_range.offset, length)
    if isinstance(byte_range, SuffixByteRequest):
        return slice(max(0, length - byte_range.suffix), length)
    return slice(0, length)


def corrupt(key: str, what: str, expected: object = None, found: object = None) -> CorruptError:
    """The error for an object whose bytes are not the committed ones."""
    return CorruptError(what, expected=expected, found=found, where=key, remedy="Restore this object or rebuild its unit.")


def checks_from(packed: Mapping[str, NDArray[np.generic]], path: str) -> ShardChecks:
    """The checks of one array out of the packed arrays."""
    group = group_of(path)
    return ShardChecks(
        *(packed[f"{group}/{name}"].astype(np.uint64, copy=False) for name in ("length", "index_crc32c", "chunk_crc32c"))
    )
