"""The reader's store: a zarr store that compares what it fetched with what was committed.

Stock zarr reads a missing, swapped, stale or zero-length shard without a word. This wrapper checks the same bytes zarr asks
for (a shard's index, an inner chunk) against the packed records; nothing extra is read. Metadata is not read at all: it follows
from manifest and seal, so a reader never notices that a later generation rewrites it.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.api.asynchronous import open_array
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import WrapperStore

from signal_store.canonical import sha256
from signal_store.errors import CorruptError
from signal_store.seal_record import ABSENT, group_of
from signal_store.shard_writer import CRC_BYTES, crc32c

CONSTANTS_KEPT = 32
INDEXES_KEPT = 4096
RECORDS_PER_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class ShardChecks:
    """What was committed of one shard."""

    length: int
    index_crc32c: int
    chunk_crc32c: NDArray[np.uint64]


class Records(Protocol):
    """Where the checks of a shard come from."""

    async def checks(self, path: str, shard: int) -> ShardChecks | None:
        """Of a shard of the array at `path`; None for an array that no unit owns."""


class SealedStore(WrapperStore[Store]):
    """Read-only view of a sealed cache; raises CorruptError, naming the object, where bytes are not the committed ones.

    `metadata`: zarr.json by key, served from here. `constants`: sha256 of objects that are checked whole. `records`: the rest.
    """

    def __init__(
        self,
        store: Store,
        metadata: Mapping[str, bytes] | None = None,
        constants: Mapping[str, str] | None = None,
        records: Records | None = None,
    ) -> None:
        super().__init__(store)
        self._metadata, self._constants, self._records = dict(metadata or {}), dict(constants or {}), records
        self._extents: OrderedDict[str, dict[tuple[int, int], int]] = OrderedDict()
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def _with_store(self, store: Store) -> "SealedStore":
        return SealedStore(store, self._metadata, self._constants, self._records)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Fetch and check; see the class. Bytes that a local copy of a remote store spoiled are fetched once more."""
        if key.endswith("zarr.json"):
            data = self._metadata.get(key)
            return None if data is None else prototype.buffer.from_bytes(data[_slice(byte_range, len(data))])
        try:
            return await self._checked(key, prototype, byte_range)
        except CorruptError:
            forget = getattr(self._store, "forget", None)
            if forget is None or not forget(key):
                raise
            return await self._checked(key, prototype, byte_range)

    async def _checked(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        if key in self._constants:
            constant = await self._whole(key)
            return prototype.buffer.from_bytes(constant[_slice(byte_range, len(constant))])
        path, _, place = key.partition("/c/")
        checks = await self._records.checks(path, int(place.split("/")[0])) if self._records is not None and place else None
        if checks is None:
            return None  # zarr asks for keys that may not exist, such as another version's metadata
        buffer = await self._store.get(key, prototype, byte_range)
        if buffer is None or len(buffer) == 0:
            raise corrupt(key, "a committed object is gone or empty")
        data = buffer.as_numpy_array().data
        if isinstance(byte_range, SuffixByteRequest):
            self._check_index(key, data, checks)
        elif isinstance(byte_range, RangeByteRequest):
            self._check_chunk(key, data, (byte_range.start, byte_range.end), checks)
        elif byte_range is None:
            self._check_shard(key, data, checks)
        else:
            raise AssertionError(f"{key}: unexpected {byte_range}")
        return buffer

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges) -> list[Buffer | None]:  # type: ignore[no-untyped-def]
        """Each range on its own, through the checks of `get`."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _whole(self, key: str) -> bytes:
        """An object that is checked whole; the last few are kept, for zarr asks for their parts one by one."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        buffer = await self._store.get(key, default_buffer_prototype())
        if buffer is None:
            raise corrupt(key, "a committed object is gone")
        data = buffer.to_bytes()
        found = sha256(data)
        if found != self._constants[key]:
            raise corrupt(key, "an object was altered", self._constants[key], found)
        self._kept[key] = data
        if len(self._kept) > CONSTANTS_KEPT:
            self._kept.popitem(last=False)
        return data

    def _check_index(self, key: str, data: memoryview, checks: ShardChecks) -> None:
        found = crc32c(data[:-CRC_BYTES])
        if checks.index_crc32c != found or data[-CRC_BYTES:] != found.to_bytes(CRC_BYTES, "little"):
            raise corrupt(key, "a shard's index is not the committed one", checks.index_crc32c, found)
        extents = np.frombuffer(data[:-CRC_BYTES], dtype="<u8").reshape(-1, 2)
        self._extents[key] = {
            (int(start), int(start + length)): chunk for chunk, (start, length) in enumerate(extents) if length != ABSENT
        }
        if len(self._extents) > INDEXES_KEPT:
            self._extents.popitem(last=False)

    def _check_chunk(self, key: str, data: memoryview, extent: tuple[int, int], checks: ShardChecks) -> None:
        chunk = self._extents.get(key, {}).get(extent)
        if chunk is None:
            raise corrupt(key, "a read that follows no committed index", found=extent)
        expected, found = int(checks.chunk_crc32c[chunk]), crc32c(data[:-CRC_BYTES])
        if expected != found or data[-CRC_BYTES:] != found.to_bytes(CRC_BYTES, "little"):
            raise corrupt(key, f"inner chunk {chunk} is not the committed one", expected, found)

    def _check_shard(self, key: str, data: memoryview, checks: ShardChecks) -> None:
        if len(data) != checks.length:
            raise corrupt(key, "a shard has another length than committed", checks.length, len(data))
        index_bytes = 16 * len(checks.chunk_crc32c) + CRC_BYTES
        self._check_index(key, data[-index_bytes:], checks)
        for start, end in self._extents[key]:
            self._check_chunk(key, data[start:end], (start, end), checks)


class PackedRecords:
    """Checks out of the arrays `units/<generation>/...`, a block of them at a time: opening a cache reads none.

    `store`: the hierarchy, its constants checked. `paths`: arrays that units own.
    """

    def __init__(self, store: SealedStore, generation: int, paths: frozenset[str]) -> None:
        self._store, self._generation, self._paths = store, generation, paths
        self._blocks: dict[tuple[str, int], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}

    async def checks(self, path: str, shard: int) -> ShardChecks | None:
        """See `Records.checks`."""
        if path not in self._paths:
            return None
        block, place = divmod(shard, RECORDS_PER_BLOCK)
        if (path, block) not in self._blocks:
            rows = slice(block * RECORDS_PER_BLOCK, (block + 1) * RECORDS_PER_BLOCK)
            columns = []
            for name in ("length", "index_crc32c", "chunk_crc32c"):
                place_of = f"{group_of(path, self._generation)}/{name}"
                array: Any = await open_array(store=self._store, path=place_of, mode="r", zarr_format=3)
                columns.append(np.asarray(await array.getitem(rows)).astype(np.uint64, copy=False))
            self._blocks[path, block] = (columns[0], columns[1], columns[2])
        length, index, chunks = self._blocks[path, block]
        if place >= len(length):
            return None
        return ShardChecks(int(length[place]), int(index[place]), chunks[place])


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
    remedy = "`teacher-cache repair` with its recipe computes it again."
    return CorruptError(what, expected=expected, found=found, where=key, remedy=remedy)
