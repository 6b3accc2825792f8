"""Where segments go in a micro-batch, and the rows of arrays that belong to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from student_train.data.aligner import Aligner, Rows, SegmentTokens
from student_train.data.unit import UnitReader

Row = list[tuple[UnitReader, int]]
"""Segments of a row, end to end: the unit and the segment's number in it."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A segment and where it goes: row `row` of the batch, from column `column`. `tokens`: as the student reads it."""

    unit: UnitReader
    segment: int
    row: int
    column: int
    tokens: SegmentTokens

    def of(self, name: str) -> int:
        """A column of the segment table."""
        return int(self.unit.segments[name][self.segment])

    def rows(self, signal: str) -> NDArray[np.int64]:
        """Its rows of a signal's arrays: those that were sampled, or, where every token has one, its tokens that are more than
        context."""
        if signal in self.unit.sampled:
            return self.unit.sampled[signal].of_segment(self.segment)
        return self.of("token_start") + np.arange(self.of("context_only"), self.of("length"))

    def places(self, signal: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which tokens of the segment, as the cache counts them, these rows of a signal are of."""
        positions = self.unit.rows(f"{signal}/rows/position")[rows] if signal in self.unit.sampled else rows
        found: NDArray[np.int64] = positions - self.of("token_start")
        return found


def place(rows: Sequence[Sequence[tuple[UnitReader, int]]], aligner: Aligner) -> tuple[Placed, ...]:
    """Segments end to end in their rows."""
    placed = []
    for number, row in enumerate(rows):
        column = 0
        for unit, segment in row:
            placed.append(Placed(unit, segment, number, column, aligner.tokens(unit, segment)))
            column += len(placed[-1].tokens)
    return tuple(placed)


@dataclass(frozen=True, slots=True)
class Placement:
    """All segments of a micro-batch whose rows are `width` tokens long. Lists are by segment; places count the cache's tokens of a
    segment."""

    segments: tuple[Placed, ...]
    width: int
    aligner: Aligner

    def rows(self, signal: str) -> list[NDArray[np.int64]]:
        """Rows of a signal's arrays with one row a token, or a sampled one; those of tokens that end where one of the student's
        does."""
        found = [p.rows(signal) for p in self.segments]
        aligned = self.aligned([p.places(signal, mine) for p, mine in zip(self.segments, found, strict=True)])
        return [rows[places >= 0] for rows, places in zip(found, aligned, strict=True)]

    def places(self, signal: str, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Places of the tokens that these rows of a signal are of."""
        return [p.places(signal, mine) for p, mine in zip(self.segments, rows, strict=True)]

    def aligned(self, places: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """The same places among the student's tokens of each segment."""
        return [self.aligner.places(p.unit, p.segment, mine) for p, mine in zip(self.segments, places, strict=True)]

    def flat(self, places: Sequence[NDArray[np.int64]]) -> Tensor:
        """int64: where these tokens stand in the batch, row * width + column."""
        pairs = zip(self.segments, self.aligned(places), strict=True)
        return joined([p.row * self.width + p.column + mine for p, mine in pairs])

    def labels(self, places: Sequence[NDArray[np.int64]]) -> Tensor:
        """int64: what the student is to predict at these tokens, IGNORE where nothing is stored or it does not count."""
        pairs = zip(self.segments, self.aligned(places), strict=True)
        return joined([p.tokens.labels[mine] for p, mine in pairs])

    def counted(self) -> tuple[Tensor, Tensor]:
        """int64 [N] each: where the rows that count stand in the batch, and their labels."""
        flat = joined([p.row * self.width + p.column + p.tokens.counted for p in self.segments])
        return flat, joined([p.tokens.labels[p.tokens.counted] for p in self.segments])

    def gathered(self, path: str, rows: Sequence[Rows]) -> Tensor:
        """Rows of an array; unsigned ones as int32, since torch computes with that."""
        found = np.concatenate([p.unit.rows(path)[mine] for p, mine in zip(self.segments, rows, strict=True)])
        if found.dtype == np.uint16:
            found = found.astype(np.int32)
        return torch.from_numpy(found.view(np.int32) if found.dtype == np.uint32 else found)

    def of_segments(self, path: str) -> Tensor:
        """Of an array with one row a segment."""
        return torch.from_numpy(np.stack([p.unit.rows(path)[p.segment] for p in self.segments]))

    def numbers(self, rows: Sequence[NDArray[np.int64]]) -> Tensor:
        """int64: the batch's number of the segment that each row is of."""
        return torch.from_numpy(np.repeat(np.arange(len(rows)), [len(mine) for mine in rows]))


def joined(parts: Sequence[NDArray[np.int64]]) -> Tensor:
    """int64, one after another."""
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)
