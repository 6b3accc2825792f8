"""How an answer's attention is shared out over the sentences of its question: the same sum of the teacher's rows,
into the cache, and of the student's, in the graph.

Legend: R rows of answers, H heads, L keys of the longest row, P sentences.
"""

import torch
from torch import Tensor

TINY = 1e-12


def evidence_shares(rows_RHL: Tensor, segment_R: Tensor, ranges_P2: Tensor, segment_P: Tensor, segments: int) -> Tensor:
    """[P] at least float32: mean over a segment's rows and over heads of the mass on each sentence, over their sum in the segment.

    `ranges_P2` first key and the one after the last, counted from the segment's first token, as keys are.
    """
    rows_RL = rows_RHL.to(torch.promote_types(rows_RHL.dtype, torch.float32)).mean(1)
    total_SL = rows_RL.new_zeros(segments, rows_RL.shape[1]).index_add(0, segment_R, rows_RL)
    upto = torch.nn.functional.pad(total_SL.cumsum(1, dtype=torch.float64), (1, 0))  # differences of sums of all before
    mass_P = (upto[segment_P, ranges_P2[:, 1]] - upto[segment_P, ranges_P2[:, 0]]).clamp(min=TINY).to(rows_RL.dtype)
    return shares_of(mass_P, segment_P, segments)


def shares_of(mass_P: Tensor, segment_P: Tensor, segments: int) -> Tensor:
    """Each mass over the sum of its segment's."""
    return mass_P / mass_P.new_zeros(segments).index_add(0, segment_P, mass_P)[segment_P]
