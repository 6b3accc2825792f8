"""Which attention rows of the student the terms look at, and how those of several terms share one capture of a layer."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from model_taps.attention import RowQuery
from model_taps.attention_statistics import STATISTICS_EVERY
from student_train.batch import CodedBatch

Rows = Literal["stored", "statistics"]
"""`stored`: those whose teacher's twins are in the batch; `statistics`: every 16th row of a segment."""


def query_of(kind: Rows, batch: CodedBatch) -> RowQuery:
    """Where the rows of a kind are."""
    if kind == "stored":
        return RowQuery(batch.row_batch, batch.row_query, batch.row_first)
    context = torch.tensor((*batch.context_only, 0), device=batch.real.device)[segment_of_token(batch)]
    own = batch.real & (batch.position_ids >= context)
    row, column = ((batch.position_ids % STATISTICS_EVERY == STATISTICS_EVERY - 1) & own).nonzero(as_tuple=True)
    return RowQuery(row, column, column - batch.position_ids[row, column])


def segment_of_token(batch: CodedBatch) -> Tensor:
    """int64 [B, S]: number in the batch of the segment that a real token is of."""
    begins = (batch.position_ids == 0) & batch.real
    return begins.flatten().cumsum(0).view(begins.shape) - 1


def joined_queries(wanted: Mapping[Rows, Sequence[int]], batch: CodedBatch) -> dict[int, RowQuery]:
    """By layer of the student, the rows of every kind that it is asked for, one kind after another."""
    queries = {kind: query_of(kind, batch) for kind in wanted}
    found = {}
    for layer in sorted({layer for layers in wanted.values() for layer in layers}):
        mine = [queries[kind] for kind, layers in wanted.items() if layer in layers]
        found[layer] = RowQuery(*(torch.cat([getattr(q, name) for q in mine]) for name in ("batch", "query", "first")))
    return found


def split_rows(
    wanted: Mapping[Rows, Sequence[int]], batch: CodedBatch, taken: Mapping[int, Tensor]
) -> dict[tuple[Rows, int], Tensor]:
    """What was captured for `joined_queries`, by kind and layer."""
    lengths = {kind: len(query_of(kind, batch)) for kind in wanted}
    found = {}
    for layer, rows in taken.items():
        kinds = [kind for kind, layers in wanted.items() if layer in layers]
        for kind, part in zip(kinds, rows.split([lengths[kind] for kind in kinds]), strict=True):
            found[kind, layer] = part
    return found
