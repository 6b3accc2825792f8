"""Stretches of text between places where tokens of both tokenizers end, and how surprised the teacher was by each."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from signal_store.signals.distribution import SCALARS
from student_train.data.part import Part
from student_train.data.placement import Placed, Placement, joined
from student_train.data.signals.base import Request
from student_train.data.unit import IGNORE


@dataclass(frozen=True, slots=True)
class ChunksPart(Part):
    """Of G chunks: `teacher` float32 [G], -log p of the text of each, in nats. Of the M rows of the student's that predict their
    tokens: `flat` int64 [M] where they stand, `labels` int64 [M], `chunk` int64 [M] which chunk each is of."""

    teacher: Tensor
    flat: Tensor
    labels: Tensor
    chunk: Tensor


@dataclass(frozen=True, slots=True)
class ChunksRequest(Request):
    """The stored log-probability of each of the teacher's tokens, and nothing else of its distribution."""

    aligns: ClassVar[bool] = True

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return ("distribution/scalars",)

    def gather(self, placement: Placement) -> ChunksPart:
        """See the base; of the same tokenizer every token is a chunk."""
        teacher, flat, labels, chunk = [], [], [], []
        chunks = 0
        for p in placement.segments:
            surprise, rows, number = _of_segment(p, placement)
            teacher.append(surprise)
            flat.append(p.row * placement.width + p.column + rows)
            labels.append(p.tokens.labels[rows])
            chunk.append(chunks + number)
            chunks += len(surprise)
        return ChunksPart(torch.from_numpy(np.concatenate(teacher)), joined(flat), joined(labels), joined(chunk))


def _of_segment(p: Placed, placement: Placement) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(-log p of each chunk, float32; the student's rows, int64; the chunk of each, int64), of chunks all of whose tokens count."""
    length = p.of("length")
    mine = placement.aligner.places(p.unit, p.segment, np.arange(length))
    theirs = np.flatnonzero(mine >= 0)
    mine = mine[theirs]
    nothing = np.zeros(0, np.int64)
    if len(mine) < 2:
        return np.zeros(0, np.float32), nothing, nothing
    start = p.of("token_start")
    logprobs = p.unit.rows("distribution/scalars")[start : start + length, SCALARS.index("label_logprob")].astype(np.float64)
    teacher = -np.add.reduceat(logprobs, theirs)[:-1]  # from one common end to the next
    rows = np.arange(mine[0], mine[-1])
    chunk = np.searchsorted(mine, rows, side="right") - 1
    counts = np.bincount(chunk, weights=p.tokens.labels[rows] == IGNORE, minlength=len(teacher)) == 0
    counts &= np.isfinite(teacher)
    number = counts.cumsum() - 1
    kept = counts[chunk]
    return teacher[counts].astype(np.float32), rows[kept], number[chunk[kept]]
