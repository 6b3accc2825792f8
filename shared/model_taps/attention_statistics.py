"""How attention rows are spread: the same numbers of the teacher, into the cache, and of the student, in the
graph.

Legend: R rows, H heads, L keys of the longest row.
"""

import torch
from torch import Tensor

TINY = 1e-30
STATISTICS_EVERY = 16
"""Statistics are means over every n-th row of a segment."""


def attention_statistics(rows_RHL: Tensor, lengths_R: Tensor, segment_R: Tensor, segments: int) -> Tensor:
    """[segments, H, 4] float32: the mean over each segment's rows of `row_statistics`; NaN for a segment without a row."""
    per_row = row_statistics(rows_RHL, lengths_R)
    totals = per_row.new_zeros(segments, *per_row.shape[1:]).index_add_(0, segment_R, per_row)
    counts = torch.bincount(segment_R, minlength=segments)
    return totals / counts.to(totals)[:, None, None].where(counts[:, None, None] > 0, torch.nan)


def row_statistics(rows_RHL: Tensor, lengths_R: Tensor) -> Tensor:
    """[R, H, 4] float32 of rows with more than one key, each in [0, 1]: entropy over log length; mean look-back
    Σ_j a_j (t - j) / (t + 1); largest mass; mass on the first token."""
    rows = rows_RHL.float()
    if not rows.numel():
        return rows.new_zeros(*rows.shape[:2], 4)
    length = lengths_R.to(rows)[:, None]
    columns_L = torch.arange(rows.shape[2], device=rows.device)
    back_RL = (lengths_R[:, None] - 1 - columns_L).clamp(min=0)
    entropy = normalised_entropy(rows, lengths_R)
    lookback = (rows * back_RL[:, None]).sum(-1) / length
    return torch.stack([entropy, lookback, rows.amax(-1), rows[..., 0]], -1)


def normalised_entropy(rows_RHL: Tensor, lengths_R: Tensor) -> Tensor:
    """[R, H], of the rows' dtype: entropy of each row over the log of its length, which is above 1; 0 focused, 1 flat."""
    # xlogy has no finite gradient at 0
    return -(rows_RHL * rows_RHL.clamp(min=TINY).log()).sum(-1) / lengths_R.to(rows_RHL)[:, None].log()
