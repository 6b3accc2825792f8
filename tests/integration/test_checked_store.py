"""No read passes the seal's check, whichever method of whichever zarr asks for it."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer import default_buffer_prototype

from signal_store.cache import Cache, open_cache
from signal_store.errors import CorruptError
from signal_store.io import sealed_store
from signal_store.io.disk_cache import DiskCachedStore, DiskCacheOptions
from signal_store.io.objects import objects_at
from signal_store.io.read_store import ReadStore
from signal_store.io.remote import RetryingStore
from signal_store.io.sealed_store import SealedStore
from signal_store.io.shard_writer import CRC_BYTES, crc32c
from signal_store.ledger.seal import ABSENT
from signal_store.sealed_part import SealedPart

pytestmark = pytest.mark.storage
PATH = "distribution/tail_codes"
KEY = f"{PATH}/c/0/0"
PROTOTYPE = default_buffer_prototype()
NOT_READS = {
    "open", "with_read_only", "is_empty", "clear", "read_only", "exists", "supports_writes", "set", "set_if_not_exists",
    "supports_consolidated_metadata", "supports_deletes", "delete", "supports_partial_writes", "supports_listing", "list",
    "list_prefix", "list_dir", "delete_dir", "close", "getsize_prefix",
}  # fmt: skip


async def _one(store: Any, wanted: ByteRequest | None) -> Any:
    return await store.get(KEY, PROTOTYPE, wanted)


async def _partial(store: Any, wanted: ByteRequest | None) -> Any:
    return (await store.get_partial_values(PROTOTYPE, [(KEY, wanted)]))[0]


async def _ranges(store: Any, wanted: ByteRequest | None) -> Any:
    found = [pair async for group in store.get_ranges(KEY, [wanted], prototype=PROTOTYPE) for pair in group]
    return found[0][1]


async def _many(store: Any, wanted: ByteRequest | None) -> Any:
    return [buffer async for _, buffer in store._get_many([(KEY, PROTOTYPE, wanted)])].pop()


async def _synchronous(store: Any, wanted: ByteRequest | None) -> Any:
    return store.get_sync(KEY, prototype=PROTOTYPE, byte_range=wanted)


async def _ranges_synchronous(store: Any, wanted: ByteRequest | None) -> Any:
    return store.get_ranges_sync(KEY, [wanted], prototype=PROTOTYPE)[0][1]


async def _size(store: Any, wanted: ByteRequest | None) -> Any:
    del wanted
    return await store.getsize(KEY)


READS: dict[str, Callable[[Any, ByteRequest | None], Any]] = {
    "get": _one,
    "get_partial_values": _partial,
    "get_ranges": _ranges,
    "_get_many": _many,
    "get_sync": _synchronous,
    "get_ranges_sync": _ranges_synchronous,
    "getsize": _size,
}


def chunk_extents(shard: bytes, chunks: int) -> list[tuple[int, int]]:
    index = np.frombuffer(shard[-16 * chunks - CRC_BYTES : -CRC_BYTES], "<u8").reshape(-1, 2)
    return [(int(start), int(start + length)) for start, length in index if length != ABSENT]


@pytest.fixture
def altered(cache: Cache, tmp_path: Path) -> tuple[Path, list[tuple[int, int]]]:
    """A copy whose first inner chunk was altered, with a checksum that fits: stock zarr has nothing to say."""
    root = Path(shutil.copytree(cache.uri, tmp_path / "copy.zarr"))
    spec = next(spec for spec in cache.manifest.specs if spec.path == PATH)
    data = bytearray((root / KEY).read_bytes())
    extents = chunk_extents(bytes(data), spec.chunks_per_shard)
    start, end = extents[0]
    data[start + (end - start) // 2] ^= 1
    data[end - CRC_BYTES : end] = crc32c(bytes(data[start : end - CRC_BYTES])).to_bytes(CRC_BYTES, "little")
    (root / KEY).write_bytes(data)
    return root, extents


def test_every_public_method_of_a_store_is_known() -> None:
    names = {name for name in dir(Store) if not name.startswith("_")}
    unknown = names - NOT_READS - READS.keys()
    assert not unknown, f"zarr's Store has new methods, say here whether they read: {sorted(unknown)}"


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("kind", ["chunk", "run", "part", "tail", "offset", "whole"])
def test_every_way_to_read_is_checked(altered: tuple[Path, list[tuple[int, int]]], name: str, kind: str) -> None:
    root, extents = altered
    (start, end), last = extents[0], extents[-1][1]
    requests: dict[str, ByteRequest | None] = {
        "chunk": RangeByteRequest(start, end),
        "run": RangeByteRequest(start, last),
        "part": RangeByteRequest(start + 1, end - 1),
        "tail": SuffixByteRequest((root / KEY).stat().st_size - start),
        "offset": OffsetByteRequest(start),
        "whole": None,
    }
    wanted = requests[kind]
    store = SealedPart(objects_at(root)).store
    missing = name.lstrip("_") not in dir(store) and name not in dir(store)
    if missing or name in {"get_sync", "get_ranges_sync"}:
        with pytest.raises((AttributeError, TypeError)):  # not offered, so nothing can go past the check
            asyncio.run(READS[name](store, wanted))
        return
    with pytest.raises(CorruptError, match="inner chunk 0 is not the committed one"):
        asyncio.run(READS[name](store, wanted))


@pytest.mark.parametrize("name", [name for name in READS if name != "getsize"])
def test_what_is_whole_is_read(cache: Cache, name: str) -> None:
    shard = (Path(cache.uri) / KEY).read_bytes()
    spec = next(spec for spec in cache.manifest.specs if spec.path == PATH)
    extents = chunk_extents(shard, spec.chunks_per_shard)
    store = SealedPart(objects_at(cache.uri)).store
    if name in {"get_sync", "get_ranges_sync"}:
        assert not hasattr(store, "get_sync")
        return
    for wanted, expected in (
        (RangeByteRequest(*extents[-1]), shard[extents[-1][0] : extents[-1][1]]),
        (RangeByteRequest(extents[0][0], extents[-1][1]), shard[extents[0][0] : extents[-1][1]]),
        (RangeByteRequest(3, 9), shard[3:9]),
        (SuffixByteRequest(5), shard[-5:]),
        (OffsetByteRequest(7), shard[7:]),
        (None, shard),
    ):
        assert asyncio.run(READS[name](store, wanted)).to_bytes() == expected


def test_an_altered_chunk_is_refused_through_zarr(altered: tuple[Path, list[tuple[int, int]]]) -> None:
    with pytest.raises(CorruptError, match=KEY):
        open_cache(altered[0]).read(PATH)


def test_an_index_that_left_memory_is_fetched_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_store, "INDEXES_KEPT", 1)
    store = SealedPart(objects_at(cache.uri)).store
    shard = (Path(cache.uri) / KEY).read_bytes()
    spec = next(spec for spec in cache.manifest.specs if spec.path == PATH)
    index = SuffixByteRequest(16 * spec.chunks_per_shard + CRC_BYTES)
    extents = chunk_extents(shard, spec.chunks_per_shard)

    async def read() -> bytes:
        await store.get(KEY, PROTOTYPE, index)
        await store.get(KEY.replace("/c/0/", "/c/1/"), PROTOTYPE, index)
        found = await store.get(KEY, PROTOTYPE, RangeByteRequest(*extents[0]))
        assert found is not None
        return found.to_bytes()

    assert asyncio.run(read()) == shard[slice(*extents[0])]


def test_what_is_used_again_stays_in_memory() -> None:
    recent: sealed_store.Recent[int] = sealed_store.Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == (1, None, 3)


class Counting(ReadStore):
    """What is asked of the store below."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.asked: list[str] = []

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        self.asked.append(key)
        return await self._inner.get(key, prototype, byte_range)

    def get_ranges(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"a store above went past its own get: {arguments}, {options}")


@pytest.mark.parametrize("name", ["get", "get_partial_values", "get_ranges"])
def test_copies_and_retries_are_on_every_way(cache: Cache, tmp_path: Path, name: str) -> None:
    below = Counting(objects_at(cache.uri).zarr_store())
    copied = DiskCachedStore(below, DiskCacheOptions(folder=str(tmp_path)), cache.uri)
    for store in (copied, RetryingStore(copied, cache.uri)):
        for _ in range(2):
            assert len(asyncio.run(READS[name](store, RangeByteRequest(0, 4)))) == 4
    assert len(below.asked) == 1


def test_a_sealed_store_writes_nothing(cache: Cache) -> None:
    store: SealedStore = SealedPart(objects_at(cache.uri)).store
    buffer = PROTOTYPE.buffer.from_bytes(b"x")
    for write in (store.set("a", buffer), store.delete("a"), store.set_if_not_exists("a", buffer)):
        with pytest.raises(ValueError, match="read-only"):
            asyncio.run(write)
    assert asyncio.run(store.exists(KEY))
    assert not asyncio.run(store.exists(f"{PATH}/c/999/0"))
    assert store.with_read_only(True) is store
