"""Rows of segments to a micro-batch of codes. Pure: arrays in, tensors out."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from signal_store.signals.distribution import SCALARS
from student_train.data.aligner import IDENTITY, Aligner
from student_train.data.batch import CodedBatch, LaneCursor
from student_train.data.part import Part
from student_train.data.placement import Placed, Placement, place
from student_train.data.request import SignalRequest
from student_train.data.signals.distribution import DistributionPart
from student_train.data.signals.tags import TagsPart, next_roles
from student_train.data.unit import UnitReader
from student_train.importance.token_weights import TokenWeights

WIDTH_STEP = 64
"""Rows of one segment are as wide as the longest, rounded up to this: few shapes to compile for."""


def collate(
    rows: Sequence[Sequence[tuple[UnitReader, int]]],
    width: int,
    request: SignalRequest,
    *,
    packed: bool,
    cursor: dict[int, LaneCursor],
    token_weights: TokenWeights | None = None,
    aligner: Aligner = IDENTITY,
) -> CodedBatch:
    """A micro-batch of these rows, each filled up to `width` tokens, or, where rows hold one segment, as long as the longest; a row
    may be empty."""
    placed = place(rows, aligner)
    longest = max((len(p.tokens) for p in placed), default=1)
    if not packed:
        width = min(width, -(-longest // WIDTH_STEP) * WIDTH_STEP)
    placement = Placement(placed, width, aligner)
    ids, positions, real = _text(placed, (len(rows), width), longest)
    flat, labels = placement.counted()
    parts = [signal.gather(placement) for signal in request] if placed else []
    aligned = aligner.rows([(p.unit, p.segment) for p in placed])
    signals = {type(part): part for part in (*parts, *(() if aligned is None else (aligned,)))}
    return CodedBatch(
        input_ids=ids,
        position_ids=positions,
        real=real,
        flat=flat,
        labels=labels,
        importance=None if token_weights is None else _importance(token_weights, placement, signals),
        segments=tuple(p.unit.first_segment + p.segment for p in placed),
        sources=tuple(p.of("source") for p in placed),
        segment_rows=tuple(len(p.tokens.counted) for p in placed),
        context_only=tuple(p.of("context_only") for p in placed),
        packed=packed,
        cursor=cursor,
        signals=signals,
    )


def _text(placed: Sequence[Placed], shape: tuple[int, int], longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions int64, and which tokens are real, bool, each of this shape."""
    rows, width = shape
    ids, positions, real = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    used = np.zeros(rows, np.int64)
    counting = np.arange(width)
    for p in placed:
        length = len(p.tokens)
        columns = slice(p.column, p.column + length)
        ids[p.row, columns], positions[p.row, columns] = p.tokens.input_ids, counting[:length]
        used[p.row] = columns.stop
    for row, start in enumerate(used):
        real[row, :start] = True
        positions[row, start:] = counting[: width - start] % longest  # filler too stays among positions that the student has
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(real)


def _importance(token_weights: TokenWeights, placement: Placement, signals: dict[type[Part], Part]) -> Tensor | None:
    """float32 [N]: what the rows weigh by their tokens' roles and the teacher's entropy; None where either was not asked for."""
    distribution = signals.get(DistributionPart)
    if TagsPart not in signals or not isinstance(distribution, DistributionPart):
        return None
    entropies = distribution.codes.scalars[:, SCALARS.index("entropy")].float().numpy()
    return torch.from_numpy(token_weights.weights(next_roles(placement), entropies))
