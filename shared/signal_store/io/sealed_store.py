"""The reader's store: a zarr store that compares what it fetched with what was committed.

Stock zarr reads a missing, swapped, stale or zero-length shard without a word. This wrapper checks the same bytes zarr asks
for (a shard's index, an inner chunk) against the packed records; nothing extra is read. Metadata is not read at all: it follows
from manifest and seal, so a reader never notices that a later generation rewrites it.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.api.asynchronous import open_array
from zarr.buffer import default_buffer_prototype

from signal_store.canonical import sha256
from signal_store.errors import CorruptError
from signal_store.io.read_store import ReadStore
from signal_store.io.shard_writer import CRC_BYTES, crc32c
from signal_store.ledger.seal import ABSENT, group_of

CONSTANTS_KEPT = 32
INDEXES_KEPT = 4096
RECORDS_PER_BLOCK = 4096

Value = TypeVar("Value")
Extents = dict[tuple[int, int], int]
"""Of a shard, (first byte, one after the last) -> inner chunk."""


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


class Recent(Generic[Value]):
    """The last `size` values that were used, by key: least recently used leaves first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """The value, which is then the most recent; None where there is none (any more)."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: str, value: Value) -> Value:
        """Keep a value, and return it."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return value


class SealedStore(ReadStore):
    """Read-only view of a sealed cache; raises CorruptError, naming the object, where bytes are not the committed ones.

    `metadata`: zarr.json by key, served from here. `constants`: sha256 of objects that are checked whole. `records`: the rest.
    """

    def __init__(
        self,
        inner: Store,
        metadata: Mapping[str, bytes] | None = None,
        constants: Mapping[str, str] | None = None,
        records: Records | None = None,
    ) -> None:
        super().__init__(inner)
        self._metadata, self._constants, self._records = dict(metadata or {}), dict(constants or {}), records
        self._extents: Recent[Extents] = Recent(INDEXES_KEPT)
        self._kept: Recent[bytes] = Recent(CONSTANTS_KEPT)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Fetch and check; see the class. Bytes that a local copy of a remote store spoiled are fetched once more."""
        if key.endswith("zarr.json"):
            data = self._metadata.get(key)
            return None if data is None else prototype.buffer.from_bytes(data[_slice(byte_range, len(data))])
        try:
            return await self._checked(key, prototype, byte_range)
        except CorruptError:
            forget = getattr(self._inner, "forget", None)
            if forget is None or not forget(key):
                raise
            return await self._checked(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        """Whether the object was committed; nothing is fetched."""
        return key in self._metadata or key in self._constants or await self._checks_of(key) is not None

    async def _checks_of(self, key: str) -> ShardChecks | None:
        """What was committed of a shard; None for a key that is none's."""
        path, _, place = key.partition("/c/")
        number = place.split("/")[0]
        return await self._records.checks(path, int(number)) if self._records is not None and number.isdecimal() else None

    async def _checked(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        if key in self._constants:
            constant = await self._whole(key)
            return prototype.buffer.from_bytes(constant[_slice(byte_range, len(constant))])
        checks = await self._checks_of(key)
        if checks is None:
            return None  # zarr asks for keys that may not exist, such as another version's metadata
        if byte_range == SuffixByteRequest(_index_bytes(checks)):
            buffer = await self._fetch(key, prototype, byte_range)
            self._keep_index(key, buffer.as_numpy_array().data, checks)
            return buffer
        chunks = await self._chunks_within(key, byte_range, checks) if isinstance(byte_range, RangeByteRequest) else None
        if chunks is None:  # no run of whole chunks: the whole shard is fetched and checked
            buffer = await self._fetch(key, prototype)
            self._check_shard(key, buffer.as_numpy_array().data, checks)
            return buffer if byte_range is None else buffer[_slice(byte_range, len(buffer))]
        buffer = await self._fetch(key, prototype, byte_range)
        self._check_chunks(key, buffer.as_numpy_array().data, chunks, checks)
        return buffer

    async def _fetch(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer:
        buffer = await self._inner.get(key, prototype, byte_range)
        if buffer is None or len(buffer) == 0:
            raise corrupt(key, "a committed object is gone or empty")
        return buffer

    async def _whole(self, key: str) -> bytes:
        """An object that is checked whole; the last few are kept, for zarr asks for their parts one by one."""
        if (kept := self._kept.get(key)) is not None:
            return kept
        data = (await self._fetch(key, default_buffer_prototype())).to_bytes()
        found = sha256(data)
        if found != self._constants[key]:
            raise corrupt(key, "an object was altered", self._constants[key], found)
        return self._kept.put(key, data)

    async def _chunks_within(
        self, key: str, byte_range: RangeByteRequest, checks: ShardChecks
    ) -> list[tuple[int, int, int]] | None:
        """(start, end, chunk), counted from the range's start, of the inner chunks that fill the range; None if they do not. An
        index that is not in memory (any more) is fetched."""
        extents = self._extents.get(key)
        if extents is None:
            index = await self._fetch(key, default_buffer_prototype(), SuffixByteRequest(_index_bytes(checks)))
            extents = self._keep_index(key, index.as_numpy_array().data, checks)
        first, end = byte_range.start, byte_range.end
        if (first, end) in extents:
            return [(0, end - first, extents[first, end])]
        inside = sorted((a, b, chunk) for (a, b), chunk in extents.items() if first <= a and b <= end)
        edges = [first, *(b for _, b, _ in inside)]
        if edges[-1] != end or any(a != edge for (a, _, _), edge in zip(inside, edges, strict=False)):
            return None
        return [(a - first, b - first, chunk) for a, b, chunk in inside]

    def _keep_index(self, key: str, data: memoryview, checks: ShardChecks) -> Extents:
        found = crc32c(data[:-CRC_BYTES])
        if checks.index_crc32c != found or data[-CRC_BYTES:] != found.to_bytes(CRC_BYTES, "little"):
            raise corrupt(key, "a shard's index is not the committed one", checks.index_crc32c, found)
        extents = np.frombuffer(data[:-CRC_BYTES], dtype="<u8").reshape(-1, 2)
        of_chunks = {(int(start), int(start + length)): chunk for chunk, (start, length) in enumerate(extents) if length != ABSENT}
        return self._extents.put(key, of_chunks)

    def _check_chunks(self, key: str, data: memoryview, chunks: list[tuple[int, int, int]], checks: ShardChecks) -> None:
        for start, end, chunk in chunks:
            body, stored = data[start : end - CRC_BYTES], data[end - CRC_BYTES : end]
            expected, found = int(checks.chunk_crc32c[chunk]), crc32c(body)
            if expected != found or stored != found.to_bytes(CRC_BYTES, "little"):
                raise corrupt(key, f"inner chunk {chunk} is not the committed one", expected, found)

    def _check_shard(self, key: str, data: memoryview, checks: ShardChecks) -> None:
        if len(data) != checks.length:
            raise corrupt(key, "a shard has another length than committed", checks.length, len(data))
        extents = self._keep_index(key, data[-_index_bytes(checks) :], checks)
        self._check_chunks(key, data, [(a, b, chunk) for (a, b), chunk in extents.items()], checks)


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


def _index_bytes(checks: ShardChecks) -> int:
    """Length of a shard's index: 16 bytes an inner chunk, and a checksum."""
    return 16 * len(checks.chunk_crc32c) + CRC_BYTES


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
