"""Coverage: whether a summary says the key words of its text (REQUIREMENTS 8).

mean over words of |c_T - c_S|, c = 1 - Π_t (1 - p_t(word)) over the summary's rows, a word told by its first token; over words of
sources with `task: summary`.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.coverage import summary_coverage
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.batch import CodedBatch, CoverageCodes
from student_train.losses.config import CoverageTerm
from student_train.losses.term import Reads, Seen, StateTerm
from student_train.stream.reader import Needs


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
    rows = torch.tensor(batch.segment_rows, device=batch.flat.device)
    segment_N = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows)

    def logits_of(flat_C: Tensor) -> Tensor:
        return seen.head.logits(seen.final[flat_C])

    return summary_coverage(logits_of, batch.flat, segment_N, codes.token, codes.segment, len(rows))
