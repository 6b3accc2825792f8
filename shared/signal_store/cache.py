"""Open a sealed cache: its manifest, its arrays through the checking store, its segments one by one."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from signal_store.errors import CorruptError, IncompleteError, MismatchError, NotFoundError
from signal_store.ledger import CALIBRATION, MANIFEST, PLAN, SEALS, UNITS, find_document, read_document, seal_key
from signal_store.manifest import Manifest, Split, parse_manifest
from signal_store.objects import LocalObjects
from signal_store.seal_record import Seal, group_of
from signal_store.sealed_store import SealedStore, checks_from

PACKED = ("length", "index_crc32c", "chunk_crc32c")


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment: the tokens the teacher saw as one context, and where its rows are.

    `input_ids` uint32 [n], `loss_mask` uint8 [n] (see `layout.token_arrays`), `next_token` the label of the last row or None;
    `token_start` the global index of its first token; `source` its source's name, `document` its number there.
    """

    index: int
    source: str
    split: Split
    document: int
    token_start: int
    context_only: int
    input_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.uint8]
    next_token: int | None

    def __len__(self) -> int:
        return len(self.input_ids)


class Cache:
    """A sealed cache. `len(cache)` segments; `cache[i]` one of them; `cache.array(path)` a zarr array whose reads are checked."""

    def __init__(self, root: Path, manifest: Manifest, seal: Seal) -> None:
        self.root, self.manifest, self.seal = root, manifest, seal

    @classmethod
    def open(cls, uri: str | Path) -> Self:
        """The cache at a path. NotFoundError, IncompleteError (not sealed) or CorruptError."""
        root = Path(uri)
        objects = LocalObjects(root)
        document = find_document(objects, MANIFEST)
        seals = [key for key in objects.list(SEALS) if key.endswith(".json")]
        if document is None or not seals:
            raise _unfinished(objects, root)
        manifest = parse_manifest(document.body, MANIFEST)
        seal = Seal.from_body(read_document(objects, seal_key(len(seals) - 1)).body)
        if seal.cache_id != manifest.cache_id:
            raise CorruptError("the seal is another cache's", expected=manifest.cache_id, found=seal.cache_id, where=root)
        return cls(root, manifest, seal)

    @cached_property
    def _group(self) -> zarr.Group:
        plain = SealedStore(LocalStore(self.root, read_only=True), self.seal)
        group = zarr.open_group(plain, mode="r", zarr_format=3)
        checks = {}
        for spec in self.manifest.specs:
            packed = {f"{group_of(spec.path)}/{name}": group[f"{group_of(spec.path)}/{name}"] for name in PACKED}
            checks[spec.path] = checks_from({key: np.asarray(array[...]) for key, array in packed.items()}, spec.path)  # type: ignore[index]
        checked = SealedStore(LocalStore(self.root, read_only=True), self.seal, checks)
        return zarr.open_group(checked, mode="r", zarr_format=3)

    def array(self, path: str) -> zarr.Array[Any]:
        """The zarr array at `path`; MismatchError naming what there is, if it is not there."""
        known = self.capacity_rows
        if path not in known and not path.startswith(("calibration/", "units/")):
            raise MismatchError(
                "the cache does not hold this array", expected=path, found=", ".join(sorted(known)), where=self.root
            )
        array = self._group[path]
        assert isinstance(array, zarr.Array)
        return array

    def read(self, path: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of the array at `path`."""
        return np.asarray(self.array(path)[start:stop])

    @cached_property
    def capacity_rows(self) -> dict[str, int]:
        """By array path, the rows that a unit has."""
        return {spec.path: spec.capacity_rows for spec in self.manifest.specs}

    @cached_property
    def segments_per_unit(self) -> NDArray[np.int64]:
        """Number of segments of each unit."""
        return self.read("units/plan/segments").astype(np.int64)

    @cached_property
    def _first_segment(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.segments_per_unit)])

    def __len__(self) -> int:
        return int(self._first_segment[-1])

    def units(self, split: Split) -> NDArray[np.int64]:
        """Numbers of the units that hold a split; a unit holds one split only."""
        validation = self.read("units/plan/is_validation").astype(bool)
        return np.flatnonzero(validation == (split == "validation"))

    def segment_columns(self, unit: int, *names: str) -> dict[str, NDArray[Any]]:
        """Columns of `segments/` for the segments of one unit, without filler."""
        first = unit * self.capacity_rows["segments/length"]
        stop = first + int(self.segments_per_unit[unit])
        return {name: self.read(f"segments/{name}", first, stop) for name in names}

    def __getitem__(self, index: int) -> Segment:
        if not -len(self) <= index < len(self):
            raise IndexError(f"segment {index} of {len(self)}")
        index %= len(self)
        unit = int(np.searchsorted(self._first_segment, index, side="right")) - 1
        place = index - int(self._first_segment[unit])
        names = ("token_start", "length", "context_only", "document", "source", "next_token")
        row = {name: int(column[place]) for name, column in self.segment_columns(unit, *names).items()}
        stop = row["token_start"] + row["length"]
        source = self.manifest.sources[row["source"]]
        return Segment(
            index=index,
            source=source.name,
            split=source.split,
            document=row["document"],
            token_start=row["token_start"],
            context_only=row["context_only"],
            input_ids=self.read("tokens/input_ids", row["token_start"], stop),
            loss_mask=self.read("tokens/loss_mask", row["token_start"], stop),
            next_token=None if row["next_token"] == 2**32 - 1 else row["next_token"],
        )

    def __repr__(self) -> str:
        m = self.manifest
        tokens = sum(source.num_tokens for source in m.sources)
        signals = ", ".join(name for name, signal in m.signals if signal is not None)
        facts = f"teacher={m.teacher.name!r} tokens={tokens:,} units={self.seal.num_units} signals=[{signals}]"
        return f"<Cache {str(self.root)!r} {facts}>"


def open_cache(uri: str | Path) -> Cache:
    """Open the sealed cache at a path; see `Cache`."""
    return Cache.open(uri)


def _unfinished(objects: LocalObjects, root: Path) -> NotFoundError | IncompleteError:
    plan = find_document(objects, PLAN)
    if plan is None:
        return NotFoundError("no cache here", expected="a folder made by teacher-cache", found=root)
    units = len(plan.body["units"])
    done = len({key.split(".")[0] for key in objects.list(UNITS)})
    stage = "calibrated" if objects.exists(CALIBRATION) else "planned"
    return IncompleteError(
        "the cache is not sealed",
        expected=f"{units} units and a seal",
        found=f"{stage}, {done} units",
        where=root,
        remedy="Run teacher-cache build with its recipe to finish it.",
    )
