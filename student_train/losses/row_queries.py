"""Which attention rows of the student the terms look at, and how those of several terms share one capture of a layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_taps.attention import RowQuery
from model_taps.attention_statistics import STATISTICS_EVERY
from model_taps.spread import evenly
from student_train.data.batch import CodedBatch
from student_train.data.signals.attention import AttentionPart
from student_train.data.signals.evidence import EvidencePart

RowsOf = Callable[[CodedBatch], RowQuery]
"""Where rows of one kind are; terms that name the same share them."""


def stored_rows(batch: CodedBatch) -> RowQuery:
    """Those whose teacher's twins are in the batch."""
    part = AttentionPart.of(batch)
    return RowQuery(part.batch, part.query, part.first)


def statistics_rows(batch: CodedBatch) -> RowQuery:
    """Every 16th row of a segment."""
    row, column = ((batch.position_ids % STATISTICS_EVERY == STATISTICS_EVERY - 1) & own_tokens(batch)).nonzero(as_tuple=True)
    return RowQuery(row, column, column - batch.position_ids[row, column])


@dataclass(frozen=True, slots=True)
class AnswerRows:
    """At most `most` of the rows that count, evenly spread, of each segment with evidence: those that the teacher's shares are
    of."""

    most: int

    def __call__(self, batch: CodedBatch) -> RowQuery:
        """Rows segment by segment."""
        rows = torch.tensor(batch.segment_rows, dtype=torch.int64, device=batch.flat.device)
        evidence = batch.part(EvidencePart)
        if evidence is None or not len(evidence.segment):
            flat = batch.flat[:0]
        else:
            asked = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            asked[evidence.segment] = True
            spread = evenly(rows, self.most)
            flat = batch.flat[spread.index[spread.inside & asked[:, None]]]
        width = batch.input_ids.shape[1]
        row, column = flat // width, flat % width
        return RowQuery(row, column, column - batch.position_ids[row, column])


def own_tokens(batch: CodedBatch) -> Tensor:
    """bool [B, S]: real tokens that are more than context to others."""
    context = torch.tensor((*batch.context_only, 0), device=batch.real.device)[segment_of_token(batch)]
    return batch.real & (batch.position_ids >= context)


def segment_of_token(batch: CodedBatch) -> Tensor:
    """int64 [B, S]: number in the batch of the segment that a real token is of."""
    begins = (batch.position_ids == 0) & batch.real
    return begins.flatten().cumsum(0).view(begins.shape) - 1


def segment_of_query(batch: CodedBatch, query: RowQuery) -> Tensor:
    """int64 [R]: number in the batch of the segment that an attention row is of."""
    return segment_of_token(batch)[query.batch, query.query]


def segment_of_row(batch: CodedBatch) -> Tensor:
    """int64 [N]: number in the batch of the segment that a row that counts is of."""
    rows = torch.tensor(batch.segment_rows, dtype=torch.int64, device=batch.flat.device)
    return torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows)


Wanted = Mapping[RowsOf, Sequence[int]]
"""By kind of rows, the student's layers that are asked for them."""


def joined_queries(wanted: Wanted, queries: Mapping[RowsOf, RowQuery]) -> dict[int, RowQuery]:
    """By layer of the student, the rows of every kind that it is asked for, one kind after another."""
    found = {}
    for layer in sorted({layer for layers in wanted.values() for layer in layers}):
        mine = [queries[kind] for kind, layers in wanted.items() if layer in layers]
        found[layer] = RowQuery(*(torch.cat([getattr(q, name) for q in mine]) for name in ("batch", "query", "first")))
    return found


def split_rows(wanted: Wanted, queries: Mapping[RowsOf, RowQuery], taken: Mapping[int, Tensor]) -> dict[tuple[RowsOf, int], Tensor]:
    """What was captured for `joined_queries`, by kind and layer."""
    found = {}
    for layer, rows in taken.items():
        kinds = [kind for kind, layers in wanted.items() if layer in layers]
        for kind, part in zip(kinds, rows.split([len(queries[kind]) for kind in kinds]), strict=True):
            found[kind, layer] = part
    return found
