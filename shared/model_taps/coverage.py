"""Whether a summary says a word: 1 - Π_t (1 - p_t(word)) over the summary's rows, of the teacher, into the cache,
and of the student, in the graph.

Legend: N rows that count, C of a chunk, V vocabulary, S segments, W words (of all, or of the longest list).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 256
"""Of a chunk of logits."""
MOST = 1 - 1e-6
"""A word that is certain: log(1 - p) is finite below."""


def log_misses(logits_CV: Tensor, segment_C: Tensor, words_SW: Tensor) -> Tensor:
    """[S, W]: Σ over these rows of log(1 - p(word)), each row's words being its segment's `words_SW` int64."""
    logits = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    ids_CW = words_SW[segment_C]
    p_CW = (logits.gather(1, ids_CW) - logits.logsumexp(1, keepdim=True)).exp().clamp(max=MOST)
    found = (-p_CW).log1p()
    return found.new_zeros(words_SW.shape).index_add(0, segment_C, found)


def coverage(log_misses_SW: Tensor) -> Tensor:
    """The probability that the summary says it, from the sum of all its rows."""
    return -log_misses_SW.expm1()


def summary_coverage(
    logits_of: Callable[[Tensor], Tensor], rows_N: Tensor, segment_N: Tensor, tokens_W: Tensor, segment_W: Tensor, segments: int
) -> Tensor:
    """[W]: of each word, whose id is in `tokens_W` and whose segment in `segment_W` (ascending), by the `rows_N` that count, of
    `segment_N`. `logits_of` rows [C] gives [C, V]. In chunks; where there are several and a gradient is wanted, their logits are
    formed again in the backward pass."""
    counts_S = torch.bincount(segment_W, minlength=segments)
    rank_W = torch.arange(len(segment_W), device=segment_W.device) - (counts_S.cumsum(0) - counts_S)[segment_W]
    words_SW = tokens_W.new_zeros(segments, int(counts_S.max()))
    words_SW[segment_W, rank_W] = tokens_W
    wanted = (counts_S > 0)[segment_N]
    rows_N, segment_N = rows_N[wanted], segment_N[wanted]

    def chunk(rows_C: Tensor, segment_C: Tensor) -> Tensor:
        return log_misses(logits_of(rows_C), segment_C, words_SW)

    total = torch.zeros(words_SW.shape, device=words_SW.device)
    for start in range(0, len(rows_N), ROWS):
        part = rows_N[start : start + ROWS], segment_N[start : start + ROWS]
        again = torch.is_grad_enabled() and len(rows_N) > ROWS
        total = total + (checkpoint(chunk, *part, use_reentrant=False) if again else chunk(*part))
    return coverage(total)[segment_W, rank_W]
