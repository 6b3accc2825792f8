"""A cache in a bucket and on a web server: built, read, checked, refused; failing stores are retried and then named."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from signal_store.cache import Cache, open_cache
from signal_store.errors import CorruptError, NotFoundError, StorageError
from signal_store.io import remote as remote_objects
from signal_store.io.disk_cache import DiskCacheOptions
from signal_store.io.objects import objects_at
from teacher_cache.commands.verify import verify
from tests.servers import Faults, s3_server, web_server
from tests.tiny import HAS_TORCH

if HAS_TORCH:
    from teacher_cache.commands.build import build
    from teacher_cache.commands.fill import fill

pytestmark = pytest.mark.storage

RecipeMaker = Callable[..., Any]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server(monkeypatch, "caches") as address:
        yield address


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_objects, "TIMEOUT_SECONDS", 2)
    monkeypatch.setattr(remote_objects, "RETRIES", 4)


@pytest.fixture
def site(cache: Cache, quick: None) -> Iterator[tuple[str, Faults]]:
    with web_server(Path(cache.uri)) as served:
        yield served


def same(a: Cache, b: Cache) -> None:
    for path in a.capacity_rows:
        rows = a.read(path)
        assert np.array_equal(rows, b.read(path), equal_nan=rows.dtype.kind == "f"), path


def test_create_tells_who_won_and_everything_else_is_idempotent(bucket: str, tmp_path: Path) -> None:
    for objects in (objects_at(f"{bucket}/objects"), objects_at(tmp_path / "objects")):
        assert objects.create("a/b", b"1")
        assert not objects.create("a/b", b"2")
        assert (objects.read("a/b"), objects.size("a/b"), objects.exists("a/c")) == (b"1", 1, False)
        with objects.stream("s/t") as file:
            for _ in range(3):
                file.write(b"x" * 1000)
        objects.publish("s/t", "p/q")
        objects.publish("s/t", "p/q")
        assert objects.size("p/q") == 3000
        with pytest.raises(NotFoundError, match="staged object is gone"):
            objects.publish("s/t", "p/r")
        assert objects.list("") == ["a/b", "p/q"]
        objects.delete("a/b")
        objects.delete("a/b")
        objects.delete_tree("p")
        objects.delete_tree("p")
        assert objects.list("") == []
        with pytest.raises(NotFoundError, match="p/q"):
            objects.read("p/q")


def test_a_cache_in_a_bucket_is_the_same_cache(bucket: str, cache: Cache, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    recipe = recipe_for(f"{bucket}/some/cache.zarr")
    fill(recipe)
    remote = build(recipe)
    assert remote.manifest.cache_id == cache.manifest.cache_id
    assert remote.seal == cache.seal
    same(cache, remote)
    assert remote[3].input_ids.tolist() == cache[3].input_ids.tolist()
    assert remote.tokenizer_files() == cache.tokenizer_files()
    assert not verify(recipe.cache).damages
    objects = objects_at(recipe.cache)
    assert not objects.list("ledger/staging")
    key = "distribution/scalars/c/0/0"
    data = bytearray(objects.read(key))
    data[100] ^= 1
    objects.put(key, bytes(data))
    assert [d.key for d in verify(recipe.cache).damages] == [key]
    with pytest.raises(CorruptError, match=key):
        open_cache(recipe.cache).read("distribution/scalars")


def test_a_web_server_serves_readers(site: tuple[str, Faults], cache: Cache, tmp_path: Path) -> None:
    address, faults = site
    remote = open_cache(address)
    assert len(remote) == len(cache)
    opened = len(faults.requests)
    assert opened < 12
    same(cache, remote)
    found = verify(address)
    assert not found.damages
    assert not found.listed
    with pytest.raises(StorageError, match="does not answer"):
        objects_at(address).put("a", b"1")


def test_answers_that_fail_are_asked_for_again_and_then_named(site: tuple[str, Faults], cache: Cache) -> None:
    address, faults = site
    remote = open_cache(address)
    for fault in ("errors", "cut", "slow"):
        setattr(faults, fault, 2 if fault != "slow" else 1)
        path = {"errors": "tokens/input_ids", "cut": "distribution/scalars", "slow": "tokens/byte_end"}[fault]
        rows = cache.read(path)
        assert np.array_equal(remote.read(path), rows, equal_nan=rows.dtype.kind == "f"), fault
    faults.broken.add("tokens/loss_mask/c/0")
    with pytest.raises(StorageError, match="tokens/loss_mask/c/0"):
        remote.read("tokens/loss_mask")


def test_a_local_copy_spares_requests_and_mends_itself(site: tuple[str, Faults], cache: Cache, tmp_path: Path) -> None:
    address, faults = site
    options = DiskCacheOptions(folder=str(tmp_path / "copies"), max_bytes=2**24)
    same(cache, open_cache(address, disk_cache=options))
    before = len(faults.requests)
    again = open_cache(address, disk_cache=options)
    rows = cache.read("distribution/scalars")
    assert np.array_equal(again.read("distribution/scalars"), rows, equal_nan=True)
    assert not any("/c/" in key for key in faults.requests[before:])
    import diskcache

    copies: Any = diskcache.Cache(str(tmp_path / "copies"))
    spoiled = [key for key in copies if "distribution/scalars/c/" in key]
    assert spoiled
    for key in spoiled:
        copies.set(key, b"\x00" * len(copies[key]), tag="\n".join(key.split("\n")[:2]))
    copies.close()
    assert np.array_equal(open_cache(address, disk_cache=options).read("distribution/scalars"), rows, equal_nan=True)
