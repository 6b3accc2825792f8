"""Open a sealed cache, or a cache with overlays: its manifest, its arrays through the checking store, its segments one by one."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, get_args, overload

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer import default_buffer_prototype

from signal_store.canonical import sha256
from signal_store.errors import CorruptError, IncompleteError, InputError, MismatchError, NotFoundError
from signal_store.format.arrays import ArraySpec
from signal_store.format.hierarchy import hierarchy_metadata
from signal_store.format.text import NO_TOKEN
from signal_store.io.disk_cache import DiskCachedStore, DiskCacheOptions
from signal_store.io.objects import Objects, objects_at
from signal_store.io.sealed_store import PackedRecords, SealedStore
from signal_store.io.shard_reader import decode_shards
from signal_store.io.zarr_sync import run_on_zarrs_loop
from signal_store.ledger.documents import CALIBRATION, MANIFEST, PLAN, UNITS, find_document, read_document, seal_key, tokenizer_key
from signal_store.ledger.seal import Seal, units_group
from signal_store.manifest import FORMAT_VERSION, Manifest, SourceIdentity, Split, parse_manifest
from signal_store.segment import Segment
from signal_store.signals import Signals


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


def newest_generation(objects: Objects) -> int | None:
    """Number of the newest seal, found without listing; None where there is none."""
    if not objects.exists(seal_key(0)):
        return None
    newest = 0
    while objects.exists(seal_key(newest + 1)):
        newest += 1
    return newest


def sealed_metadata(manifest: Manifest, seal: Seal) -> dict[str, bytes]:
    """Every zarr.json of the hierarchy at a generation."""
    arrays = {spec: seal.num_units * spec.capacity_rows for spec in manifest.specs} | seal.constant_specs
    attributes = {"format": "teacher-cache", "format_version": str(FORMAT_VERSION), "cache_id": manifest.cache_id}
    return hierarchy_metadata(arrays, attributes)


class Cache:
    """A sealed cache, alone or with overlays. `len(cache)` segments; `cache[i]` one of them; `cache.array(path)` a zarr array whose
    reads are checked. `signal_view.CacheView` is one whose segments decode."""

    def __init__(self, parts: Sequence[SealedPart]) -> None:
        """One part holds the text, the others are overlays; MismatchError where they do not belong together or share a signal."""
        bases = [part for part in parts if not part.manifest.plan.overlay]
        if len(bases) != 1:
            found = f"{len(bases)} of {len(parts)}"
            remedy = "Open an overlay together with the cache it stands on: open_cache([base, overlay])."
            raise MismatchError(
                "one cache must hold the text", expected="exactly one that is no overlay", found=found, remedy=remedy
            )
        self.base = bases[0]
        self.parts = (self.base, *(part for part in parts if part is not self.base))
        self.uri = " + ".join(part.uri for part in self.parts)
        for part in self.parts[1:]:
            _refuse_other_plan(self.base, part)
        _refuse_twice(self.parts)
        self.manifest = _joined_manifest(self.parts)
        self.seal = self.base.seal
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @classmethod
    def open(
        cls,
        uri: str | Path | Sequence[str | Path],
        *,
        generation: int | None = None,
        disk_cache: DiskCacheOptions | None = None,
    ) -> Self:
        """See `open_cache`."""
        several = [uri] if isinstance(uri, str | Path) else list(uri)
        return cls([SealedPart(objects_at(one), generation, disk_cache) for one in several])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it anew, at the same generation."""
        return _reopened, (type(self), [(part.uri, part.seal.generation, part.disk_cache) for part in self.parts])

    def _part(self, path: str) -> SealedPart:
        for part in self.parts:
            if path in part.paths:
                return part
        found = ", ".join(sorted(path for part in self.parts for path in part.capacity_rows))
        raise MismatchError("the cache does not hold this array", expected=path, found=found, where=self.uri)

    def array(self, path: str) -> "zarr.Array[Any]":
        """The zarr array at `path`; MismatchError naming what there is, if it is not there."""
        if path not in self._arrays:
            array = self._part(path).group[path]
            assert isinstance(array, zarr.Array)
            self._arrays[path] = array
        return self._arrays[path]

    def read(self, path: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of the array at `path`."""
        return np.asarray(self.array(path)[start:stop])

    def read_unit(self, unit: int, rows: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """The first rows of a unit's arrays, by path so many. `read` is the slow, obvious twin."""
        found: dict[str, NDArray[Any]] = {}
        owners = {path: self._part(path) for path in rows}
        for part in set(owners.values()):
            found |= part.read_unit(unit, {path: count for path, count in rows.items() if owners[path] is part})
        return {path: found[path] for path in rows}

    @cached_property
    def capacity_rows(self) -> dict[str, int]:
        """By array path, the rows that a unit has."""
        return {path: rows for part in self.parts for path, rows in part.capacity_rows.items()}

    @property
    def sources(self) -> tuple[SourceIdentity, ...]:
        """Sources of all generations; `segments/source` counts in these."""
        return (*self.base.manifest.sources, *self.seal.added_sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources."""
        return sum(source.num_tokens for source in self.sources)

    @cached_property
    def segments_per_unit(self) -> NDArray[np.int64]:
        """Number of segments of each unit."""
        return self._of_units("segments").astype(np.int64)

    def _of_units(self, name: str) -> NDArray[Any]:
        return np.asarray(self.base.group[f"{units_group(self.seal.generation)}/plan/{name}"][...])  # type: ignore[index]

    @cached_property
    def _first_segment(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.segments_per_unit)])

    def first_segment(self, unit: int) -> int:
        """Number of a unit's first segment."""
        return int(self._first_segment[unit])

    def __len__(self) -> int:
        return self.seal.num_segments

    @cached_property
    def _is_validation(self) -> NDArray[np.bool_]:
        return self._of_units("is_validation").astype(bool)

    def units(self, split: Split) -> NDArray[np.int64]:
        """Numbers of the units that hold a split; a unit holds one split only. InputError for another name."""
        if split not in get_args(Split):
            raise InputError("no such split", expected=" or ".join(get_args(Split)), found=split, where=self.uri)
        return np.flatnonzero(self._is_validation == (split == "validation"))

    def segment_columns(self, unit: int, *names: str, group: str = "segments") -> dict[str, NDArray[Any]]:
        """Columns of `segments/` (or of a signal's own `<signal>/segments/`) for the segments of one unit, without filler."""
        count = int(self.segments_per_unit[unit])
        found = self.read_unit(unit, {f"{group}/{name}": count for name in names})
        return {name: found[f"{group}/{name}"] for name in names}

    def place_of(self, index: int) -> tuple[int, int]:
        """(unit, place in the unit) of a segment; IndexError if there is none."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"no segment {index}: there are {len(self)}, from 0")
        index %= len(self)
        unit = int(np.searchsorted(self._first_segment, index, side="right")) - 1
        return unit, index - int(self._first_segment[unit])

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Segment]: ...
    def __getitem__(self, index: int | slice) -> Segment | Sequence[Segment]:
        """One segment, or those of a slice."""
        if isinstance(index, slice):
            return [self._segment(number) for number in range(*index.indices(len(self)))]
        return self._segment(index)

    def row_of_segment(self, path: str, index: int) -> NDArray[Any]:
        """A segment's row of an array with one row a segment, such as `segments/length` or `stats/ffn/values`."""
        unit, place = self.place_of(index)
        axis = (self.array(path).metadata.dimension_names or ("",))[0]  # type: ignore[union-attr]
        if axis != "segment":
            raise MismatchError("an array that has not one row a segment", expected="segment first", found=axis, where=path)
        row = unit * self.capacity_rows[path] + place
        found: NDArray[Any] = self.read(path, row, row + 1)[0]
        return found

    def _segment(self, index: int) -> Segment:
        unit, place = self.place_of(index)
        names = ("token_start", "length", "context_only", "document", "source", "next_token", "finished")
        row = {name: int(column[place]) for name, column in self.segment_columns(unit, *names).items()}
        stop = row["token_start"] + row["length"]
        source = self.sources[row["source"]]
        return Segment(
            index=int(self._first_segment[unit]) + place,
            source=source.name,
            split=source.split,
            document=row["document"],
            token_start=row["token_start"],
            context_only=row["context_only"],
            finished=bool(row["finished"]),
            input_ids=self.read("tokens/input_ids", row["token_start"], stop),
            loss_mask=self.read("tokens/loss_mask", row["token_start"], stop),
            next_token=None if row["next_token"] == NO_TOKEN else row["next_token"],
        )

    def __iter__(self) -> Iterator[Segment]:
        return (self[index] for index in range(len(self)))

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's own files by name, as `save_pretrained` wrote them; CorruptError if one was altered."""
        found = {}
        for name, expected in self.seal.tokenizer.items():
            found[name] = self.base.objects.read(tokenizer_key(name))
            if sha256(found[name]) != expected:
                raise CorruptError(
                    "a tokenizer file was altered", expected=expected, found=sha256(found[name]), where=tokenizer_key(name)
                )
        return found

    def __repr__(self) -> str:
        m = self.manifest
        signals = ", ".join(name for name, signal in m.signals if signal is not None)
        facts = f"teacher={m.teacher.name!r} tokens={self.num_tokens:,} units={self.seal.num_units} signals=[{signals}]"
        return f"<Cache {self.uri!r} {facts}>"


def open_cache(
    uri: str | Path | Sequence[str | Path], *, generation: int | None = None, disk_cache: DiskCacheOptions | None = None
) -> Cache:
    """Open the sealed cache at a path, `s3://` or `https://` address; or a cache and its overlays, which then read as one.

    `generation` opens an older seal; `disk_cache` keeps a copy of what a remote store gives. Nothing but a few small objects is
    read, however large the cache. NotFoundError, IncompleteError, MismatchError or CorruptError.
    """
    return Cache.open(uri, generation=generation, disk_cache=disk_cache)


def _reopened(kind: type[Cache], parts: Sequence[tuple[str, int, DiskCacheOptions | None]]) -> Cache:
    return kind([SealedPart(objects_at(uri), generation, disk_cache) for uri, generation, disk_cache in parts])


def _refuse_other_plan(base: SealedPart, part: SealedPart) -> None:
    mine, other = base.manifest, part.manifest
    pairs = {
        "plan": (mine.plan.text_digest, other.plan.text_digest),
        "tokenizer": (mine.tokenizer.digest, other.tokenizer.digest),
        "teacher": (mine.teacher.weights_digest, other.teacher.weights_digest),
        "units": (base.seal.num_units, part.seal.num_units),
    }
    differ = [name for name, (a, b) in pairs.items() if a != b]
    if differ == ["units"]:
        raise MismatchError(
            "the base has grown since the overlay was built",
            expected=f"{part.seal.num_units} units",
            found=base.seal.num_units,
            where=base.uri,
            remedy="Open both as they were: open_cache([base, overlay], generation=0).",
        )
    if differ:
        raise MismatchError(
            f"these caches do not belong together ({', '.join(differ)} differ)",
            expected={name: pairs[name][0] for name in differ},
            found={name: pairs[name][1] for name in differ},
            where=part.uri,
            remedy="Build the overlay with `base:` naming this cache, and the same teacher.",
        )


def _refuse_twice(parts: Sequence[SealedPart]) -> None:
    held: dict[str, str] = {}
    for part in parts:
        for name, signal in part.manifest.signals:
            if signal is not None and name in held:
                raise MismatchError(f"two caches hold the signal {name}", expected=held[name], found=part.uri, remedy="Open one.")
            if signal is not None:
                held[name] = part.uri


def _joined_manifest(parts: Sequence[SealedPart]) -> Manifest:
    """The base's manifest with the signals of all parts."""
    base = parts[0].manifest
    if len(parts) == 1:
        return base
    calibrations = [part.manifest.calibration for part in parts]
    held = {name: signal for part in parts for name, signal in part.manifest.signals if signal is not None}
    owner = {name: part.manifest.calibration for part in parts for name, signal in part.manifest.signals if signal is not None}
    first = owner.get("distribution", base.calibration)
    calibration = base.calibration.model_copy(
        update={
            "tail_rank": first.tail_rank,
            "coverage": first.coverage,
            "hidden": tuple(h for c in calibrations for h in c.hidden),
            "attention": tuple(a for c in calibrations for a in c.attention),
            "stats": owner["stats"].stats if "stats" in owner else None,
            "replay_layers": tuple(n for c in calibrations for n in c.replay_layers),
            "evidence_layers": tuple(n for c in calibrations for n in c.evidence_layers),
        }
    )
    signals = Signals.model_construct(**{name: held.get(name) for name in Signals.model_fields})
    arrays = tuple(array for part in parts for array in part.manifest.arrays)
    return base.model_copy(update={"signals": signals, "calibration": calibration, "arrays": arrays})


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
