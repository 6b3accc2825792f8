"""Attention rows of keyword tokens, and of the tokens before them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.part import Part
from student_train.data.placement import Placed, Placement, joined
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class AttentionCodes:
    """Rows of one teacher layer, entries end to end: uint8 `weights` [E, H]; `columns` int32 [E, H] and float16 `residual` [R, H]
    where only the heaviest columns are kept, else None."""

    weights: Tensor
    columns: Tensor | None
    residual: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPart(Part):
    """Of R rows: `batch`, the batch's row, `query`, the column, `first`, the column where the segment begins, `length`, the stored
    entries: int64 [R]; `keyword` bool [R], False for a token before a keyword. `layers` by teacher layer."""

    batch: Tensor
    query: Tensor
    first: Tensor
    length: Tensor
    keyword: Tensor
    layers: dict[int, AttentionCodes]

    @classmethod
    def of(cls, batch: CodedBatch) -> "AttentionPart":
        """The batch's; an empty one where it has none, as where there is no segment."""
        none = batch.flat[:0]
        return batch.part(cls) or cls(none, none, none, none, none.bool(), {})


@dataclass(frozen=True, slots=True)
class AttentionRequest(Request):
    """Teacher `layers`: the keywords' own rows, and with `steps` those of the tokens before them too."""

    layers: tuple[int, ...]
    steps: bool = False

    @classmethod
    def whole(cls, cache: Cache) -> "AttentionRequest":
        """See the base."""
        return cls(tuple(layout.layer for layout in cache.manifest.calibration.attention), steps=True)

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return ("attention/rows/", *(f"{name}/" for name in self.described())) if self.layers else ()

    def described(self) -> tuple[str, ...]:
        """See the base."""
        return tuple(f"attention/{layer}" for layer in self.layers)

    def gather(self, placement: Placement) -> AttentionPart:
        """See the base."""
        segments = placement.segments
        rows = [self._wanted(p) for p in segments]
        queries = placement.aligned(placement.places("attention", rows))
        entries = [_entries(p, mine) for p, mine in zip(segments, rows, strict=True)]

        def each(value: str) -> Tensor:
            return joined([np.full(len(mine), getattr(p, value), np.int64) for p, mine in zip(segments, rows, strict=True)])

        return AttentionPart(
            batch=each("row"),
            query=joined([p.column + mine for p, mine in zip(segments, queries, strict=True)]),
            first=each("column"),
            length=placement.gathered("attention/rows/length", rows).long(),
            keyword=placement.gathered("attention/rows/keyword", rows).bool(),
            layers={layer: _codes(placement, layer, rows, entries) for layer in self.layers},
        )

    def _wanted(self, p: Placed) -> NDArray[np.int64]:
        rows = p.rows("attention")
        wanted: NDArray[np.int64] = rows if self.steps else rows[p.unit.rows("attention/rows/keyword")[rows] == 1]
        return wanted


def _entries(p: Placed, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the entries of these rows, row after row."""
    offsets, lengths = (p.unit.rows(f"attention/rows/{name}")[rows].astype(np.int64) for name in ("offset", "length"))
    inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    numbers: NDArray[np.int64] = np.repeat(offsets, lengths) + inside
    return numbers


def _codes(placement: Placement, layer: int, rows: list[NDArray[np.int64]], entries: list[NDArray[np.int64]]) -> AttentionCodes:
    group = f"attention/{layer}"
    weights = placement.gathered(f"{group}/weights", entries)
    if not placement.segments[0].unit.has(f"{group}/columns"):
        return AttentionCodes(weights, None, None)
    columns, residual = placement.gathered(f"{group}/columns", entries), placement.gathered(f"{group}/residual", rows)
    return AttentionCodes(weights, columns, residual)
