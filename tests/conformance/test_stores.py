"""What every place of objects, and every store that reads one, must hold to.

A place is registered in `PLACES`. A store is registered by being a `ReadStore` of `signal_store.io`: one that `MAKERS` does not know
how to make fails here. Whatever a reader asks for, in whichever way, it gives the bytes that lie there; what is not there is None;
nothing is written.
"""

import asyncio
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer import default_buffer_prototype

import signal_store.io
from signal_store.cache import Cache
from signal_store.errors import NotFoundError
from signal_store.io.disk_cache import DiskCachedStore, DiskCacheOptions
from signal_store.io.objects import Objects, objects_at
from signal_store.io.read_store import ReadStore
from signal_store.io.remote import RetryingStore
from signal_store.io.sealed_store import SealedStore
from signal_store.sealed_part import SealedPart
from tests.servers import s3_server

pytestmark = pytest.mark.storage
PROTOTYPE = default_buffer_prototype()
SHARD = "distribution/tail_codes/c/0/0"

PLACES = ("folder", "bucket")
MAKERS: dict[type[ReadStore], Callable[[Cache, Path], Store]] = {
    SealedStore: lambda cache, _: SealedPart(objects_at(cache.uri)).store,
    DiskCachedStore: lambda cache, folder: DiskCachedStore(
        objects_at(cache.uri).zarr_store(), DiskCacheOptions(folder=str(folder)), cache.uri
    ),
    RetryingStore: lambda cache, _: RetryingStore(objects_at(cache.uri).zarr_store(), cache.uri),
}


@pytest.fixture(params=PLACES)
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Objects]:
    if request.param == "folder":
        yield objects_at(tmp_path)
    else:
        with s3_server(monkeypatch, "places") as address:
            yield objects_at(f"{address}/{tmp_path.name}")  # the emulator keeps what another test put


@pytest.fixture(params=MAKERS, ids=lambda kind: kind.__name__)
def store(request: pytest.FixtureRequest, cache: Cache, tmp_path: Path) -> Store:
    return MAKERS[request.param](cache, tmp_path)


def test_create_tells_who_won(objects: Objects) -> None:
    assert objects.create("a/b", b"first")
    assert not objects.create("a/b", b"second")
    assert objects.read("a/b") == b"first"
    assert (objects.size("a/b"), objects.exists("a/b"), objects.size("a/c"), objects.exists("a/c")) == (5, True, None, False)


def test_put_replaces_and_stream_is_whole_or_not_there(objects: Objects) -> None:
    objects.put("a", b"1")
    objects.put("a", b"22")
    assert objects.read("a") == b"22"
    with objects.stream("s") as file:
        for _ in range(3):
            file.write(b"x" * 1000)
    assert objects.read("s") == b"x" * 3000


def test_publish_moves_once_and_whoever_comes_second_finds_it_done(objects: Objects) -> None:
    objects.put("staged", b"1")
    for _ in range(2):
        objects.publish("staged", "final/x")
    assert objects.list("") == ["final/x"]
    assert objects.read("final/x") == b"1"
    with pytest.raises(NotFoundError, match="staged object is gone"):
        objects.publish("staged", "final/y")


def test_lists_are_sorted_and_deletes_can_be_repeated(objects: Objects) -> None:
    for key in ("b/2", "a/1", "b/1", "bb"):
        objects.put(key, b"")
    assert objects.list("") == ["a/1", "b/1", "b/2", "bb"]
    assert objects.list("b") == ["b/1", "b/2"]
    for _ in range(2):
        objects.delete("bb")
        objects.delete_tree("b")
    assert objects.list("") == ["a/1"]
    with pytest.raises(NotFoundError, match="b/1"):
        objects.read("b/1")


def test_every_store_is_tested() -> None:
    for module in pkgutil.iter_modules(signal_store.io.__path__, "signal_store.io."):
        importlib.import_module(module.name)
    found, stores = [ReadStore], set()
    while found:
        kinds = [kind for kind in found.pop().__subclasses__() if kind.__module__.startswith("signal_store.io.")]
        found += kinds
        stores |= set(kinds)
    assert stores == MAKERS.keys()


async def _read(store: Store, key: str, wanted: ByteRequest | None) -> list[bytes | None]:
    """The answers of each way to ask."""
    answers = [await store.get(key, PROTOTYPE, wanted), *await store.get_partial_values(PROTOTYPE, [(key, wanted)])]
    return [None if answer is None else answer.to_bytes() for answer in answers]


@settings(max_examples=40)
@given(data=st.data())
def test_any_range_is_the_bytes_that_lie_there(cache: Cache, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lies = (Path(cache.uri) / SHARD).read_bytes()
    start = data.draw(st.integers(0, len(lies) - 1))
    wanted, expected = data.draw(
        st.sampled_from(
            [
                (None, lies),
                (RangeByteRequest(start, end := data.draw(st.integers(start + 1, len(lies)))), lies[start:end]),
                (OffsetByteRequest(start), lies[start:]),
                (SuffixByteRequest(len(lies) - start), lies[start:]),
            ]
        )
    )
    for kind, make in MAKERS.items():
        store = make(cache, tmp_path_factory.mktemp("copies"))
        for _ in range(2):  # the second time from what a store may keep
            assert asyncio.run(_read(store, SHARD, wanted)) == [expected] * 2, kind


def test_what_is_not_there_is_none(store: Store) -> None:
    for key in ("distribution/nothing/c/0/0", "distribution/tail_codes/c/999999/0"):
        assert asyncio.run(_read(store, key, None)) == [None, None]
        assert not asyncio.run(store.exists(key))
    assert asyncio.run(store.exists(SHARD))


def test_a_list_is_that_of_the_place(store: Store, cache: Cache) -> None:
    async def listed() -> list[str]:
        return [key async for key in store.list_prefix("distribution/tail_codes")]

    place = Path(cache.uri)
    lies = {path.relative_to(place).as_posix() for path in (place / "distribution/tail_codes").rglob("*") if path.is_file()}
    assert store.supports_listing
    assert set(asyncio.run(listed())) == lies


def test_nothing_is_written(store: Store) -> None:
    buffer = PROTOTYPE.buffer.from_bytes(b"x")
    for write in (store.set("a", buffer), store.delete("a"), store.set_if_not_exists("a", buffer)):
        with pytest.raises(ValueError, match="read-only"):
            asyncio.run(write)
    assert store.read_only
    assert not store.supports_writes
    assert not store.supports_deletes
    assert store.with_read_only(True) is store
    with pytest.raises(ValueError, match="read-only"):
        store.with_read_only(False)
