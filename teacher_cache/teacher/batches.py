"""How the segments of a unit share the teacher's forward passes: which are in one batch, and where they lie in its rows."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_taps.neighbours import Composition
from model_taps.packing import best_fit, position_ids
from teacher_cache.corpus.unit_plan import UnitPlan


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """Consecutive segments [first, last) of a unit, laid out in rows: `rows[b]` are segment numbers, end to end."""

    first: int
    last: int
    rows: tuple[tuple[int, ...], ...]


def compose(lengths: NDArray[np.int64], composition: Composition, context: int, batch_tokens: int) -> list[TeacherBatch]:
    """The batches of a unit, a pure function of the plan: as many consecutive segments as fit and as may share a pass.

    Packed: into at most batch_tokens // context rows of `context`, best fit. Padded: one a row, rows as long as the longest. Alone:
    one.
    """
    batches = []
    first = 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and _fits(lengths[first : last + 1], composition, context, batch_tokens):
            last += 1
        packed = composition.forward == "packed"
        rows = best_fit(lengths[first:last].tolist(), context) if packed else [[i] for i in range(last - first)]
        batches.append(TeacherBatch(first, last, tuple(tuple(first + i for i in row) for row in rows)))
        first = last
    return batches


def _fits(lengths: NDArray[np.int64], composition: Composition, context: int, batch_tokens: int) -> bool:
    if composition.forward == "alone":
        return len(lengths) == 1
    if composition.split_length is not None and len(set(lengths > composition.split_length)) > 1:
        return False
    if composition.forward == "padded":
        return int(lengths.max()) * len(lengths) <= batch_tokens
    max_rows = batch_tokens // context
    return int(lengths.sum()) <= max_rows * context and len(best_fit(lengths.tolist(), context)) <= max_rows


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """A batch laid out in rows: ids and positions [B, S]; where each of the unit's tokens went (`flat`, b * S + s), and where its
    segment begins in its row."""

    input_ids: Tensor
    positions: Tensor | None
    tokens: slice
    flat: NDArray[np.int64]
    segment_first: NDArray[np.int64]


def lay_out(unit: UnitPlan, batch: TeacherBatch) -> BatchLayout:
    """Token ids and positions of the batch's rows, and where each token went."""
    width = max(int(unit.length[list(row)].sum()) for row in batch.rows)
    input_ids = torch.zeros(len(batch.rows), width, dtype=torch.long)
    positions = torch.zeros(len(batch.rows), width, dtype=torch.long)
    tokens = slice(int(unit.token_start[batch.first]), int(unit.token_start[batch.last - 1] + unit.length[batch.last - 1]))
    flat = np.zeros(tokens.stop - tokens.start, dtype=np.int64)
    segment_first = np.zeros(len(flat), dtype=np.int64)
    for b, row in enumerate(batch.rows):
        column = 0
        for segment in row:
            start, length = int(unit.token_start[segment]), int(unit.length[segment])
            places = slice(start - tokens.start, start - tokens.start + length)
            input_ids[b, column : column + length] = torch.from_numpy(unit.input_ids[start : start + length].astype(np.int64))
            flat[places] = b * width + column + np.arange(length)
            segment_first[places] = column
            column += length
        positions[b] = position_ids([int(unit.length[s]) for s in row], width)
    packed = any(len(row) > 1 for row in batch.rows)
    return BatchLayout(input_ids, positions if packed else None, tokens, flat, segment_first)
