"""The path of a segment's states along its tokens: where each token is on it, and how far it moves."""

import torch
from torch import Tensor

from student_train.data.batch import CodedBatch
from student_train.losses.row_queries import segment_of_row

TINY = 1e-12


def places_of(batch: CodedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of the N rows that count: number of the segment int64 [N], place among its rows int64 [N], and whether the row before is the
    token before, bool [N]."""
    rows = torch.tensor(batch.segment_rows, dtype=torch.int64, device=batch.flat.device)
    segment_N = segment_of_row(batch)
    place_N = torch.arange(len(batch.flat), device=rows.device) - (rows.cumsum(0) - rows)[segment_N]
    follows_N = torch.zeros_like(place_N, dtype=torch.bool)
    follows_N[1:] = (batch.flat[1:] == batch.flat[:-1] + 1) & (place_N[1:] > 0)
    return segment_N, place_N, follows_N


def moved(states_ND: Tensor, segment_N: Tensor, segments: int, follows_N: Tensor) -> Tensor:
    """‖h_t - h_{t-1}‖² over the mean squared distance of the segment's states from their mean; 0 where nothing precedes.

    Args:
        states_ND: h, float32 or float64 [N, D], segment by segment, in the order of the text.
        segment_N: int64 in [0, segments).
        segments: how many there are.
        follows_N: bool, whether the state before is of the token before.
    Returns:
        Float [N], at least 0, without unit, not reduced; neither scale nor a constant offset of a segment's states changes it.
    """
    counts = torch.bincount(segment_N, minlength=segments).clamp(min=1).to(states_ND)
    mean = states_ND.new_zeros(segments, states_ND.shape[1]).index_add(0, segment_N, states_ND) / counts[:, None]
    squares_N = (states_ND - mean[segment_N]).square().sum(1)
    variance = states_ND.new_zeros(segments).index_add(0, segment_N, squares_N) / counts
    steps_N = torch.zeros_like(squares_N)
    steps_N[1:] = (states_ND[1:] - states_ND[:-1]).square().sum(1)
    return steps_N * follows_N / (variance[segment_N] + TINY)
