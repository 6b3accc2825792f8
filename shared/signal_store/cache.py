"""Open a sealed cache, or a cache with overlays: its manifest, its arrays through the checking store, its segments one by one."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, get_args, overload

import numpy as np
import zarr
from numpy.typing import NDArray

from signal_store.canonical import sha256
from signal_store.errors import CorruptError, InputError, MismatchError
from signal_store.format.text import NO_TOKEN
from signal_store.io.disk_cache import DiskCacheOptions
from signal_store.io.objects import objects_at
from signal_store.ledger.documents import tokenizer_key
from signal_store.ledger.seal import units_group
from signal_store.manifest import SourceIdentity, Split
from signal_store.overlays import joined_manifest, refuse_other_plan, refuse_twice
from signal_store.sealed_part import SealedPart
from signal_store.segment import Segment


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
            refuse_other_plan(self.base, part)
        refuse_twice(self.parts)
        self.manifest = joined_manifest(self.parts)
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
