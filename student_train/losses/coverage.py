"""Coverage: whether a summary says the key words of its text (REQUIREMENTS 8).

mean over words of |c_T - c_S|, c = 1 - Π_t (1 - p_t(word)) over the summary's rows, a word told by its first token; over words of
sources with `task: summary`. Where there are many such rows, the student's logits are formed in chunks, and again in the backward
pass.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from model_taps.coverage import coverage, log_misses
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.batch import CodedBatch, CoverageCodes
from student_train.losses.config import CoverageTerm
from student_train.losses.term import Reads, Seen, StateTerm
from student_train.stream.reader import Needs

ROWS = 256
"""Of a chunk of logits."""


class Coverage(StateTerm):
    """See the module."""

    def __init__(self, _section: CoverageTerm, cache: Cache, _student: PreTrainedModel) -> None:
        super().__init__()
        if cache.manifest.signals.coverage is None:
            raise MismatchError(
                "coverage needs a signal that the cache does not hold",
                expected="coverage",
                found="none",
                where=cache.uri,
                remedy="Build a cache with signals.coverage from a source with task: summary, or switch coverage off.",
            )
        self.reads = Reads(Needs(False, (), (), coverage=True))

    def count(self, batch: CodedBatch) -> int:
        """Key words."""
        return 0 if batch.coverage is None else len(batch.coverage.token)

    def forward(self, seen: Seen) -> Tensor:
        """See the module."""
        codes = seen.batch.coverage
        if codes is None or not len(codes.token):
            return 0 * (seen.final.sum() + seen.head.weight.sum())
        return (student_coverage(seen, codes) - codes.probability.float()).abs().sum()


def student_coverage(seen: Seen, codes: CoverageCodes) -> Tensor:
    """[W] float32, in the graph."""
    batch = seen.batch
    counts_S = torch.bincount(codes.segment, minlength=len(batch.segments))
    rank_W = torch.arange(len(codes.segment), device=codes.segment.device) - (counts_S.cumsum(0) - counts_S)[codes.segment]
    words_SW = codes.token.new_zeros(len(batch.segments), int(counts_S.max()))
    words_SW[codes.segment, rank_W] = codes.token
    rows = torch.tensor(batch.segment_rows, device=batch.flat.device)
    segment_N = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows)
    wanted = (counts_S > 0)[segment_N]
    flat_N, segment_N = batch.flat[wanted], segment_N[wanted]

    def chunk(hidden_CD: Tensor, segment_C: Tensor) -> Tensor:
        return log_misses(seen.head.logits(hidden_CD), segment_C, words_SW)

    total = torch.zeros(words_SW.shape, device=words_SW.device)
    for start in range(0, len(flat_N), ROWS):
        part = slice(start, start + ROWS)
        given = seen.final[flat_N[part]], segment_N[part]
        total = total + (chunk(*given) if len(flat_N) <= ROWS else checkpoint(chunk, *given, use_reentrant=False))
    return coverage(total)[codes.segment, rank_W]
