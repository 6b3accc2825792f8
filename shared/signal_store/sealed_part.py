"""One sealed cache at one of its generations: manifest, seal, and its arrays through the checking store."""

import asyncio
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.buffer import default_buffer_prototype

from signal_store.errors import CorruptError, IncompleteError, MismatchError, NotFoundError
from signal_store.format.arrays import ArraySpec
from signal_store.format.hierarchy import hierarchy_metadata
from signal_store.io.disk_cache import DiskCachedStore, DiskCacheOptions
from signal_store.io.objects import Objects
from signal_store.io.sealed_store import PackedRecords, SealedStore
from signal_store.io.shard_reader import decode_shards
from signal_store.io.zarr_sync import run_on_zarrs_loop
from signal_store.ledger.documents import (
    CALIBRATION,
    MANIFEST,
    PLAN,
    UNITS,
    find_document,
    newest_generation,
    read_document,
    seal_key,
)
from signal_store.ledger.seal import Seal
from signal_store.manifest import FORMAT_VERSION, Manifest, parse_manifest


class SealedPart:
    """One sealed cache, as it was at a generation: manifest, seal, and its arrays through the checks."""

    def __init__(self, objects: Objects, generation: int | None = None, disk_cache: DiskCacheOptions | None = None) -> None:
        """NotFoundError, IncompleteError (not sealed) or CorruptError. None takes the newest generation."""
        self.objects, self.uri, self.disk_cache = objects, objects.uri, disk_cache
        document = find_document(objects, MANIFEST)
        newest = newest_generation(objects)
        if document is None or newest is None:
            raise _unfinished(objects)
        wanted = newest if generation is None else generation
        if not 0 <= wanted <= newest:
            raise MismatchError("no such generation", expected=f"0 to {newest}", found=wanted, where=self.uri)
        self.manifest = parse_manifest(document.body, MANIFEST)
        self.seal = Seal.from_body(read_document(objects, seal_key(wanted)).body)
        if self.seal.cache_id != self.manifest.cache_id:
            raise CorruptError(
                "the seal is another cache's", expected=self.manifest.cache_id, found=self.seal.cache_id, where=self.uri
            )

    @cached_property
    def store(self) -> SealedStore:
        """Its objects; every read is checked."""
        store = self.objects.zarr_store()
        if self.disk_cache is not None:
            store = DiskCachedStore(store, self.disk_cache, self.uri)
        metadata = sealed_metadata(self.manifest, self.seal)
        constants = SealedStore(store, metadata, self.seal.constants)
        paths = frozenset(spec.path for spec in self.manifest.specs)
        records = PackedRecords(constants, self.seal.generation, paths)
        return SealedStore(store, metadata, self.seal.constants, records)

    @cached_property
    def group(self) -> zarr.Group:
        """The hierarchy; every read is checked."""
        return zarr.open_group(self.store, mode="r", zarr_format=3)

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """The arrays that units fill, by path."""
        return {spec.path: spec for spec in self.manifest.specs}

    def read_unit(self, unit: int, rows: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """The first rows of a unit's arrays, by path so many, from their whole shards, all fetched at once."""
        _ = self.store  # made here: making it asks zarr's loop, which the coroutine would already be in
        fetched = run_on_zarrs_loop(self._shards(unit, rows))
        return {path: decode_shards(fetched[path], self.specs[path], count) for path, count in rows.items()}

    async def _shards(self, unit: int, rows: Mapping[str, int]) -> dict[str, list[memoryview]]:
        async def shards_of(path: str, count: int) -> list[memoryview]:
            spec = self.specs[path]
            first = unit * spec.shards_per_unit
            keys = [spec.shard_key(first + number) for number in range(-(-count // spec.shard_rows))]
            return [await self._whole(key) for key in keys]

        found = await asyncio.gather(*(shards_of(path, count) for path, count in rows.items()))
        return dict(zip(rows, found, strict=True))

    async def _whole(self, key: str) -> memoryview:
        buffer = await self.store.get(key, default_buffer_prototype())
        assert buffer is not None  # the sealed store raises for an object that is gone
        return buffer.as_numpy_array().data

    @cached_property
    def capacity_rows(self) -> dict[str, int]:
        """By array path, the rows that a unit has."""
        return {spec.path: spec.capacity_rows for spec in self.manifest.specs}

    @cached_property
    def paths(self) -> set[str]:
        """All arrays, those that no unit owns too."""
        return {*self.capacity_rows, *(spec.path for spec in self.seal.constant_specs)}


def sealed_metadata(manifest: Manifest, seal: Seal) -> dict[str, bytes]:
    """Every zarr.json of the hierarchy at a generation."""
    arrays = {spec: seal.num_units * spec.capacity_rows for spec in manifest.specs} | seal.constant_specs
    attributes = {"format": "teacher-cache", "format_version": str(FORMAT_VERSION), "cache_id": manifest.cache_id}
    return hierarchy_metadata(arrays, attributes)


def _unfinished(objects: Objects) -> NotFoundError | IncompleteError:
    plan = find_document(objects, PLAN)
    if plan is None:
        return NotFoundError("no cache here", expected="one made by teacher-cache", found=objects.uri)
    units = len(plan.body["units"])
    if objects.exists(seal_key(0)):
        return IncompleteError(
            "the cache has no manifest", expected=MANIFEST, found="a seal", where=objects.uri, remedy="Run teacher-cache repair."
        )
    done = len({key.split(".")[0] for key in objects.list(UNITS)})
    stage = "calibrated" if objects.exists(CALIBRATION) else "planned"
    return IncompleteError(
        "the cache is not sealed",
        expected=f"{units} units and a seal",
        found=f"{stage}, {done} units",
        where=objects.uri,
        remedy="Run teacher-cache build with its recipe to finish it.",
    )
