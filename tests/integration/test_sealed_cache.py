"""What lies in a sealed cache: zarr and xarray read it, what it says of itself, and damage that is named and never read."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_store.cache import Cache, open_cache
from signal_store.errors import CorruptError, IncompleteError, NotFoundError
from signal_store.format import hierarchy
from signal_store.io.local import LocalObjects
from signal_store.io.objects import objects_at
from signal_store.ledger.documents import MANIFEST, commit, parse_document, read_document, seal_key
from signal_store.sealed_part import SealedPart
from tests.conftest import RecipeMaker
from tests.tiny import HAS_TORCH

if HAS_TORCH:
    from teacher_cache.commands.build import build
    from teacher_cache.commands.fill import fill
pytestmark = pytest.mark.storage


def test_opens_with_plain_zarr_and_xarray(cache: Cache) -> None:
    group = zarr.open_group(cache.uri, mode="r", zarr_format=3)
    ids = group["tokens/input_ids"]
    assert isinstance(ids, zarr.Array)
    segment = cache[3]
    stop = segment.token_start + len(segment)
    assert np.array_equal(ids[segment.token_start : stop], segment.input_ids)
    tree = xarray.open_datatree(cache.uri, engine="zarr", zarr_format=3, mask_and_scale=False)
    assert np.array_equal(np.asarray(tree["tokens/input_ids"])[segment.token_start : stop], segment.input_ids)
    one = xarray.open_zarr(cache.uri, group="distribution", zarr_format=3, consolidated=False)
    assert one["scalars"].dims == ("token", "scalar")
    assert np.isnan(one["scalars"].values[-1]).all()


def test_every_array_has_names_and_a_fill_value(cache: Cache) -> None:
    for spec in cache.manifest.specs:
        array = cache.array(spec.path)
        assert len(array.metadata.dimension_names or ()) == array.ndim  # type: ignore[union-attr]
        assert "_FillValue" in array.attrs


def copy_of(cache: Cache, folder: Path) -> Path:
    return Path(shutil.copytree(cache.uri, folder / "copy.zarr"))


def read_all(root: Path) -> None:
    opened = open_cache(root)
    for spec in opened.manifest.specs:
        opened.read(spec.path)
    for name in ("tail_basis", "tail_bias", "tail_step"):
        opened.read(f"calibration/distribution/{name}")
    opened.units("train")


@pytest.mark.parametrize("seed", range(24))
def test_a_flipped_bit_is_never_read(cache: Cache, tmp_path: Path, seed: int) -> None:
    root = copy_of(cache, tmp_path)
    rng = np.random.default_rng(seed)
    group = ["distribution", "tokens", "hidden", "attention", "segments", "units", "calibration", "ledger/seals"][seed % 8]
    files = sorted(p for p in (root / group).rglob("*") if p.is_file() and p.stat().st_size)
    if group == "calibration":
        files = [p for p in files if "tail_b" in str(p)]
    if group == "units":
        files = [p for p in files if not {"sha256", "plan"} & set(p.parts)]
    path = files[rng.integers(len(files))]
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    before = {p: p.read_bytes() for p in [path]}
    try:
        read_all(root)
    except CorruptError as error:
        assert "\n" not in str(error)
        return
    # An untouched reading is allowed only where the byte is in nobody's way: the `about` block of a seal, or group metadata
    # that the consolidated root replaces.
    assert path.name == "zarr.json" or group == "ledger/seals"
    if group == "ledger/seals":
        assert parse_document(before[path], "seal").body == read_document(LocalObjects(cache.uri), seal_key(0)).body


@pytest.mark.parametrize("damage", ["deleted", "empty", "truncated", "swapped"])
def test_damaged_shards_are_named(cache: Cache, tmp_path: Path, damage: str) -> None:
    root = copy_of(cache, tmp_path)
    first, second = (root / f"distribution/tail_codes/c/{n}/0" for n in (0, 1))
    if damage == "deleted":
        first.unlink()
    elif damage == "empty":
        first.write_bytes(b"")
    elif damage == "truncated":
        first.write_bytes(first.read_bytes()[:-9])
    else:
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    with pytest.raises(CorruptError, match="distribution/tail_codes/c/"):
        open_cache(root).read("distribution/tail_codes")


def test_unfinished_and_missing_caches_are_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no cache here"):
        open_cache(tmp_path)
    root = copy_of(cache, tmp_path)
    shutil.rmtree(root / "ledger" / "seals")
    with pytest.raises(IncompleteError, match="not sealed"):
        open_cache(root)


def test_the_cache_says_what_it_is(cache: Cache) -> None:
    assert "llama" not in repr(cache)
    assert "distribution, hidden, attention" in repr(cache)
    assert len(cache) == cache.segments_per_unit.sum()
    assert cache[-1].index == len(cache) - 1
    with pytest.raises(IndexError):
        cache[len(cache)]
    assert cache.manifest.cache_id == read_document(LocalObjects(cache.uri), MANIFEST).digest


def test_an_interrupt_after_the_commit_loses_nothing(
    tmp_path: Path, recipe_for: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path / "c.zarr", signals={"distribution": {"rank": 4}, "hidden": {"positions": {"every": 3}}})

    def commit_then_stop(*arguments: Any, **about: Any) -> Any:
        commit(*arguments, **about)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("teacher_cache.builder.fill.commit", commit_then_stop)
        with pytest.raises(KeyboardInterrupt):
            fill(recipe)
    cache = build(recipe)
    read_all(Path(cache.uri))
    tree = xarray.open_datatree(cache.uri, engine="zarr", zarr_format=3, mask_and_scale=False)
    assert tree["hidden/rows/position"].shape == tree["hidden/block_output/2/scale"].shape


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whole_shards_read_as_zarr_reads_them(cache: Cache, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(cache.capacity_rows)))
    unit = data.draw(st.integers(0, cache.seal.num_units - 1))
    capacity = cache.capacity_rows[path]
    rows = data.draw(st.integers(0, capacity))
    expected = cache.read(path, unit * capacity, unit * capacity + rows)
    found = cache.read_unit(unit, {path: rows})[path]
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected, equal_nan=found.dtype.kind == "f")


def test_whole_shards_can_be_the_first_that_is_read(cache: Cache) -> None:
    hierarchy._hierarchy_metadata.cache_clear()
    part = SealedPart(objects_at(cache.uri))
    (ids,) = part.read_unit(0, {"tokens/input_ids": 8}).values()
    np.testing.assert_array_equal(ids, cache.read("tokens/input_ids", 0, 8))


def test_a_spoiled_shard_is_refused_whole(cache: Cache, tmp_path: Path) -> None:
    root = Path(shutil.copytree(cache.uri, tmp_path / "cache.zarr"))
    shard = root / "distribution/tail_codes/c/1/0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(bytes(data))
    opened = open_cache(root)
    opened.read_unit(0, {"distribution/tail_codes": 9})
    with pytest.raises(CorruptError, match=r"tail_codes/c/1/0"):
        opened.read_unit(1, {"distribution/tail_codes": 9})
    shard.unlink()
    with pytest.raises(CorruptError, match=r"tail_codes/c/1/0"):
        open_cache(root).read_unit(1, {"distribution/tail_codes": 9})
