"""The probability that a summary says each key word of its text, as the teacher would write it (REQUIREMENTS 8)."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_taps.coverage import coverage, log_misses
from teacher_cache.positions import Places

ROWS = 256
"""Of a chunk of logits."""


@torch.inference_mode()
def extract_coverage(
    logits_of: Callable[[Tensor], Tensor], rows: Places, segment_N: Places, tokens: NDArray[np.int64], segment_W: Places
) -> Tensor:
    """[words] float32. `rows` of the batch count for the summaries of `segment_N`; the words' `tokens` are of `segment_W`."""
    if not len(tokens):
        return torch.zeros(0)
    counts = np.bincount(segment_W)
    rank = np.arange(len(segment_W)) - (np.cumsum(counts) - counts)[segment_W]
    words_SW = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64)
    words_SW[segment_W, rank] = torch.from_numpy(tokens)
    total = torch.zeros(words_SW.shape)
    for start in range(0, len(rows), ROWS):
        logits = logits_of(torch.from_numpy(rows[start : start + ROWS]))
        segment_C = torch.from_numpy(segment_N[start : start + ROWS]).to(logits.device)
        total += log_misses(logits, segment_C, words_SW.to(logits.device)).cpu()
    return coverage(total)[segment_W, rank]
