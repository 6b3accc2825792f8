"""Reads whole units of the arrays that are asked for, and nothing else; each array when it is first asked for, once.

What an array's first axis counts says how many of its rows hold something: tokens, segments, the rows of a sampled signal
(`<signal>/segments/` has where they are), or the entries of such rows (`<signal>/rows/offset` and `length`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.format.arrays import ArraySpec

IGNORE = -100
"""The label of a row that has none."""
SEGMENT_COLUMNS = ("token_start", "length", "context_only", "next_token", "source")


@dataclass(frozen=True, slots=True)
class Read:
    """An array that is read, and the name of the signal that it is of."""

    spec: ArraySpec
    signal: str

    @property
    def axis(self) -> str:
        """What its rows are: `token`, `segment`, `row` or `entry`."""
        return self.spec.dimension_names[0]


@dataclass(frozen=True, slots=True)
class RowRanges:
    """Rows of a sampled signal by segment: `start`, counted from the unit's first, and `rows`, how many; int64 [segments]."""

    start: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, cache: Cache, unit: int, signal: str) -> "RowRanges":
        """As `<signal>/segments/` has them."""
        columns = cache.segment_columns(unit, "row_start", "rows", group=f"{signal}/segments")
        first_row = unit * cache.capacity_rows[f"{signal}/rows/position"]
        return cls(columns["row_start"].astype(np.int64) - first_row, columns["rows"].astype(np.int64))

    def of_segment(self, segment: int) -> NDArray[np.int64]:
        """Numbers of a segment's rows."""
        start = int(self.start[segment])
        return np.arange(start, start + int(self.rows[segment]))


@dataclass(frozen=True, slots=True)
class UnitText:
    """A unit's token rows: `input_ids` int64 [n]; `labels` int64 [n], IGNORE where none is stored or it does not count; `kept` by
    segment, its rows whose distribution counts: a slice where they are neighbours."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    kept: list[slice | NDArray[np.int64]]

    @classmethod
    def of(cls, input_ids: NDArray[np.int64], mask: NDArray[np.uint8], segments: dict[str, NDArray[np.int64]]) -> "UnitText":
        """From the stored arrays and the segment table."""
        start, end = segments["token_start"], segments["token_start"] + segments["length"]
        following = np.append(input_ids[1:], 0)
        following[end - 1] = segments["next_token"]
        counting = np.flatnonzero((mask == 1) | (mask == 2))
        kept: list[slice | NDArray[np.int64]] = []
        for first, last in np.searchsorted(counting, np.stack([start, end], 1)).tolist():
            rows = counting[first:last]
            neighbours = len(rows) > 0 and rows[-1] - rows[0] + 1 == len(rows)
            kept.append(slice(int(rows[0]), int(rows[-1]) + 1) if neighbours else rows)
        return cls(input_ids, np.where(mask == 1, following, IGNORE), kept)


@dataclass(slots=True)
class UnitReader:
    """One unit. `reads`: by path, the arrays that may be asked for. `segments` has one row per segment, `sampled` the row ranges of
    the signals that are sampled; starts, positions and offsets count from the unit's own first row.

    Only rows that hold something are read: filler at the end of a unit is not.
    """

    cache: Cache
    unit: int
    reads: Mapping[str, Read]
    segments: dict[str, NDArray[np.int64]]
    sampled: dict[str, RowRanges]
    told: Any = None
    """What an aligner keeps of it."""
    _rows: dict[str, NDArray[Any]] = field(default_factory=dict)
    _text: UnitText | None = None

    @classmethod
    def of(cls, cache: Cache, unit: int, reads: Mapping[str, Read]) -> "UnitReader":
        """With its segment table read."""
        columns = {name: column.astype(np.int64) for name, column in cache.segment_columns(unit, *SEGMENT_COLUMNS).items()}
        columns["token_start"] -= unit * cache.manifest.plan.unit_tokens
        signals = dict.fromkeys(read.signal for path, read in reads.items() if path == f"{read.signal}/rows/position")
        return cls(cache, unit, reads, columns, {signal: RowRanges.of(cache, unit, signal) for signal in signals})

    @property
    def first_segment(self) -> int:
        """Global number of its first segment."""
        return self.cache.first_segment(self.unit)

    def has(self, path: str) -> bool:
        """Whether the array is among those that are read."""
        return path in self.reads

    def rows(self, path: str) -> NDArray[Any]:
        """The unit's rows of an array."""
        if path not in self._rows:
            self._read([path])
        return self._rows[path]

    @property
    def text(self) -> UnitText:
        """Its token rows, with labels."""
        if self._text is None:
            ids, mask = self.rows("tokens/input_ids"), self.rows("tokens/loss_mask")
            self._text = UnitText.of(ids.astype(np.int64), mask, self.segments)
        return self._text

    def read_all(self) -> None:
        """Read every array that may be asked for; first what says how long the others are."""
        entries = [path for path, read in self.reads.items() if read.axis == "entry"]
        for wanted in ([path for path in self.reads if path not in entries], entries):
            self._read([path for path in wanted if path not in self._rows])
        _ = self.text

    def _read(self, paths: Sequence[str]) -> None:
        found = self.cache.read_unit(self.unit, {path: self._count(path) for path in paths})
        for path, rows in found.items():
            counted = self._counted_in_units_of(path)
            self._rows[path] = rows if counted is None else rows - self.unit * counted

    def _counted_in_units_of(self, path: str) -> int | None:
        """Of an array of numbers of rows of another array: how many of those a unit has."""
        signal = self.reads[path].signal
        if path == f"{signal}/rows/position":
            return self.cache.manifest.plan.unit_tokens
        if path == f"{signal}/rows/offset":
            return next(read.spec.capacity_rows for read in self.reads.values() if (read.signal, read.axis) == (signal, "entry"))
        return None

    def _count(self, path: str) -> int:
        """Rows of an array that hold something."""
        signal, axis = self.reads[path].signal, self.reads[path].axis
        if axis == "segment":
            return len(self.segments["length"])
        if axis == "entry":
            offsets, lengths = self.rows(f"{signal}/rows/offset"), self.rows(f"{signal}/rows/length")
            return int(offsets[-1] + lengths[-1]) if len(offsets) else 0
        if axis == "row" and signal in self.sampled:
            return int(self.sampled[signal].start[-1] + self.sampled[signal].rows[-1])
        return int(self.segments["token_start"][-1] + self.segments["length"][-1])
