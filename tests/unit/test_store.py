"""The format: bytes as zarr writes them, readable by zarr and xarray, and nothing damaged is read in silence."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from signal_store.errors import NotFoundError, StorageError
from signal_store.format.arrays import FILL, ArraySpec, grid
from signal_store.format.hierarchy import create_array, hierarchy_metadata
from signal_store.io.local import LocalObjects
from signal_store.io.shard_writer import UnitArrayWriter, write_unit_array
from tests.tiny import HAS_TORCH, needs_torch

if HAS_TORCH:
    import torch

    from signal_store.codecs.distribution import DistributionCodec, top_k
pytestmark = pytest.mark.storage


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(sorted(FILL)),
    width=st.integers(0, 5),
    capacity=st.integers(1, 700),
    share=st.floats(0, 1),
    shuffle=st.sampled_from(["noshuffle", "shuffle", "bitshuffle"]),
    transposed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_shards_are_zarrs_own_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    width: int,
    capacity: int,
    share: float,
    shuffle: str,
    transposed: bool,
    seed: int,
) -> None:
    row_shape = (width,) if width else ()
    spec = ArraySpec(
        path="a/b", dtype=dtype, row_shape=row_shape, dimension_names=("row", "c")[: 1 + len(row_shape)], level=6,
        shuffle=shuffle,  # type: ignore[arg-type]
        capacity_rows=-(-capacity // 64) * 64, chunk_rows=16, shard_rows=64, transposed=transposed and bool(row_shape),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 50, size=(int(capacity * share), *row_shape)).astype(dtype)
    folder = tmp_path_factory.mktemp("shards")
    objects = LocalObjects(folder)
    with UnitArrayWriter(objects, "mine", spec, unit=1) as writer:
        for part in np.array_split(rows, 3):
            writer.append(part)
        records = writer.close()
    store = MemoryStore()
    create_array(store, spec, 2 * spec.capacity_rows)
    array = zarr.open_array(store, path="a/b")
    full = np.full((spec.capacity_rows, *row_shape), spec.fill)
    full[: len(rows)] = rows
    array[spec.capacity_rows :] = full
    theirs = {key: value.to_bytes() for key, value in store._store_dict.items() if "/c/" in key}
    for shard, record in enumerate(records):
        key = spec.shard_key(spec.shards_per_unit + shard)
        mine = objects.read(f"mine/{key}")
        assert len(mine) == record.length
        if key in theirs:
            assert mine == theirs[key]
        else:  # zarr leaves out a shard that holds nothing; ours is an index of empty chunks
            assert all(crc is None for crc in record.chunk_crc32c)
    shutil.rmtree(folder)


@given(capacity=st.integers(1, 10**6), row_bytes=st.integers(1, 40_000), least=st.sampled_from([1, 16_384]))
def test_grid_divides(capacity: int, row_bytes: int, least: int) -> None:
    rounded, chunk, shard = grid(capacity, row_bytes, least)
    assert rounded >= capacity
    assert rounded % shard == 0
    assert shard % chunk == 0
    assert shard * row_bytes <= 64 * 2**20 or shard == chunk


@given(exponent=st.integers(6, 20), row_bytes=st.integers(1, 9000))
def test_token_arrays_keep_the_units_size(exponent: int, row_bytes: int) -> None:
    assert grid(2**exponent, row_bytes, 1)[0] == 2**exponent


def test_metadata_is_a_function_of_the_specs() -> None:
    spec = ArraySpec.of("x/y", "uint8", 100, "row")
    assert hierarchy_metadata({spec: 100}, {"a": "b"}) == hierarchy_metadata({spec: 100}, {"a": "b"})
    assert set(hierarchy_metadata({spec: 100}, {})) == {"zarr.json", "x/zarr.json", "x/y/zarr.json"}


def test_create_tells_who_won(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    assert objects.create("a/b", b"first")
    assert not objects.create("a/b", b"second")
    assert objects.read("a/b") == b"first"
    assert objects.list("a") == ["a/b"]


def test_publish_is_idempotent(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    objects.put("staging/x", b"1")
    objects.publish("staging/x", "final/x")
    objects.publish("staging/x", "final/x")
    assert objects.read("final/x") == b"1"
    with pytest.raises(NotFoundError):
        objects.publish("staging/y", "final/y")


@pytest.mark.parametrize(("number", "words"), [(28, "disk is full"), (30, "cannot be written"), (13, "access is refused")])
def test_a_full_or_forbidden_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def fails(_fd: int) -> None:
        raise OSError(number, "as the kernel says")

    monkeypatch.setattr("signal_store.io.local.os.fsync", fails)
    with pytest.raises(StorageError, match=words):
        LocalObjects(tmp_path).put("a", b"1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_write_unit_array_round_trips(tmp_path: Path) -> None:
    spec = ArraySpec.of("v", "float32", 10, "row", "c", row_shape=(3,))
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    objects = LocalObjects(tmp_path)
    write_unit_array(objects, "z", spec, 0, rows)
    for key, data in hierarchy_metadata({spec: 10}, {}).items():
        objects.put(f"z/{key}", data)
    found = zarr.open_array(tmp_path / "z" / "v", mode="r")
    assert np.array_equal(found[:], rows)


@needs_torch
@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(1, 9000), k=st.integers(0, 140), seed=st.integers(0, 99), equal=st.booleans())
def test_top_k_is_torchs(vocab: int, k: int, seed: int, equal: bool) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if equal else logits
    k = min(k, vocab)
    values, ids = top_k(logits, k)
    expected, _ = logits.topk(k, dim=1)
    assert torch.equal(values, expected)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@needs_torch
@settings(max_examples=30, deadline=None)
@given(
    temperatures=st.sampled_from([(1.0, 2.0, 3.0, 4.0), (1.0,), (3.0, 1.0), (1.0, 8.0, 4.0, 2.0), (1.0, 1.5, 3.0)]),
    scale=st.floats(0.1, 60),
    seed=st.integers(0, 99),
)
def test_masses_are_those_of_the_plain_sum(temperatures: tuple[float, ...], scale: float, seed: int) -> None:
    logits = scale * torch.randn(4, 600, generator=torch.Generator().manual_seed(seed))
    codec = DistributionCodec(
        temperatures, 8, 8, 8, 100.0, None, torch.zeros(2), torch.zeros(2, 0), torch.zeros(0), torch.zeros(600, 0), torch.zeros(600)
    )
    codes, _ = codec.encode(torch.zeros(4, 2), logits.clone(), torch.tensor([0, 5, -1, 599]))
    for temperature in temperatures:
        p = (logits.double() / temperature).softmax(1)
        head = p.gather(1, codes.head_ids.long()).sum(1)
        tail = p.scatter(1, codes.head_ids.long(), 0).sum(1)
        found = codes.scalars[:, codec.mass_column(temperature)].double()
        expected = head.log() - tail.log()
        close = (found - expected).abs() <= 2e-3 * expected.abs().clamp(min=1) + 1e-3
        assert (close | (tail < 1e-8)).all()
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert torch.allclose(codes.scalars[:, 2].double(), entropy, rtol=2e-3, atol=2e-3)
