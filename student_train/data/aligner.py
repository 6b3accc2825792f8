"""From the tokens of a cache to those that a student reads: batches take ids, labels and places through an aligner alone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from signal_store.cache import Cache
from student_train.align.aligned_cache import AlignedCache
from student_train.align.unit_view import UnitView
from student_train.align.view import View
from student_train.align.walk import Ints
from student_train.data.aligned_rows import AlignedRows
from student_train.data.unit import IGNORE, UnitReader

Rows = Ints | slice
"""Numbers of rows of a unit's array."""


@dataclass(frozen=True, slots=True)
class SegmentTokens:
    """A segment as the student reads it: `input_ids` int64 [m]; `labels` int64 [m], IGNORE where there is none or it does not
    count; `counted` int64 [N], which of them are rows that count; `rows`: of those, the rows of the cache's arrays with one row a
    token."""

    input_ids: Ints
    labels: Ints
    counted: Ints
    rows: Rows

    def __len__(self) -> int:
        return len(self.input_ids)


class Aligner(ABC):
    """How one student reads one cache."""

    @abstractmethod
    def lengths(self, unit: UnitReader) -> Ints:
        """int64 [segments]: the student's tokens of each segment of a unit."""

    @abstractmethod
    def tokens(self, unit: UnitReader, segment: int) -> SegmentTokens:
        """A segment of a unit."""

    @abstractmethod
    def places(self, unit: UnitReader, segment: int, places: Ints) -> Ints:
        """Where tokens of the cache, by their places in a segment, stand among the student's tokens of it; -1 where none of these
        ends with them."""

    def rows(self, _segments: Sequence[tuple[UnitReader, int]]) -> AlignedRows | None:
        """How the rows of `SegmentTokens.counted`, of these segments one after another, stand to the teacher's; None where the
        tokens are the same."""
        return None


class IdentityAligner(Aligner):
    """A student with the teacher's tokenizer: its tokens are the cache's."""

    def lengths(self, unit: UnitReader) -> Ints:
        """See the base."""
        return unit.segments["length"]

    def tokens(self, unit: UnitReader, segment: int) -> SegmentTokens:
        """See the base."""
        start = int(unit.segments["token_start"][segment])
        own = slice(start, start + int(unit.segments["length"][segment]))
        kept = unit.text.kept[segment]
        places = (np.arange(kept.start, kept.stop) if isinstance(kept, slice) else kept) - start
        return SegmentTokens(unit.text.input_ids[own], unit.text.labels[own], places, kept)

    def places(self, _unit: UnitReader, _segment: int, places: Ints) -> Ints:
        """See the base."""
        return places


IDENTITY = IdentityAligner()


class ViewAligner(Aligner):
    """As a view says."""

    def __init__(self, view: View) -> None:
        self.view = view

    def _of(self, unit: UnitReader) -> UnitView:
        if unit.told is None:
            unit.told = self.view.unit(unit.unit)
        found: UnitView = unit.told
        return found

    def _segment(self, unit: UnitReader, segment: int) -> tuple[UnitView, slice]:
        told = self._of(unit)
        return told, slice(int(told.token_start[segment]), int(told.token_start[segment + 1]))

    def lengths(self, unit: UnitReader) -> Ints:
        """See the base."""
        return self._of(unit).length.astype(np.int64)

    def tokens(self, unit: UnitReader, segment: int) -> SegmentTokens:
        """See the base; where the teacher has no row, its first stands in its place, and counts for nothing."""
        told, own = self._segment(unit, segment)
        ids = told.input_ids[own].astype(np.int64)
        counts = told.counts[own]
        counted = np.flatnonzero(counts)
        start = int(unit.segments["token_start"][segment])
        rows = start + told.teacher[own][counted].clip(0).astype(np.int64)
        return SegmentTokens(ids, np.where(counts, np.append(ids[1:], IGNORE), IGNORE), counted, rows)

    def places(self, unit: UnitReader, segment: int, places: Ints) -> Ints:
        """See the base; of several tokens of the student's that end there, the last."""
        told, own = self._segment(unit, segment)
        same = np.flatnonzero(told.same_text[own])
        found = np.full(int(unit.segments["length"][segment]), -1, np.int64)
        found[told.teacher[own][same]] = same
        return found[places]

    def rows(self, segments: Sequence[tuple[UnitReader, int]]) -> AlignedRows:
        """See the base."""
        parts = []
        for unit, segment in segments:
            told, own = self._segment(unit, segment)
            counts = told.counts[own]
            ranges = (told.spoken[own], told.first[own], told.last[own], np.append(told.text_bytes[own][1:], 0))
            parts.append([part[counts] for part in (told.same_text[own], told.one_to_one[own], told.within[own], *ranges)])
        if not parts:
            nothing, none = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
            return AlignedRows(nothing, nothing, nothing, none, none, none, none)
        joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
        flags, numbers = joined[:3], (column.astype(np.int64) for column in joined[3:])
        return AlignedRows(*map(torch.from_numpy, flags), *map(torch.from_numpy, numbers))


def aligner_of(cache: Cache) -> Aligner:
    """Between its tokens and the student's."""
    return ViewAligner(cache.view) if isinstance(cache, AlignedCache) else IDENTITY
