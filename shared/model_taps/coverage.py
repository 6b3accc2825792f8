"""Whether a summary says a word (REQUIREMENTS 8): 1 - Π_t (1 - p_t(word)) over the summary's rows, of the teacher, into the cache,
and of the student, in the graph.

Legend: C rows of a chunk, V vocabulary, S segments, W words of the longest list.
"""

import torch
from torch import Tensor

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
