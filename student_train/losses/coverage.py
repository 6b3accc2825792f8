"""Coverage: whether a summary says the key words of its text.

mean over words of |c_T - c_S|, c = 1 - Π_t (1 - p_t(word)) over the summary's rows, a word told by its first token; over words of
sources with `task: summary`.
"""

from torch import Tensor
from transformers import PreTrainedModel

from model_taps.coverage import summary_coverage
from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.coverage import CoveragePart, CoverageRequest
from student_train.losses.kinds import Kind
from student_train.losses.row_queries import segment_of_row
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import Reads, StateLoss, StateTerm, StudentOutputs, TermSection, not_cached


class CoverageSection(TermSection):
    """|c_T - c_S|, c the probability that the summary says a key word of its text; mean over key words of sources with
    `task: summary`."""

    weight: WeightField = constant(0.2)


class Coverage(StateLoss):
    """Through the output head; without parameters."""

    def __init__(self, _section: CoverageSection, cache: Cache, _student: PreTrainedModel) -> None:
        super().__init__()
        if cache.manifest.signals.coverage is None:
            raise not_cached("coverage", "signals.coverage and a source with task: summary", cache)
        self.reads = Reads(SignalRequest.of(CoverageRequest()))

    def count(self, batch: CodedBatch) -> int:
        """Key words."""
        part = batch.part(CoveragePart)
        return 0 if part is None else len(part.token)

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Over key words."""
        codes = outputs.batch.part(CoveragePart)
        if codes is None or not len(codes.token):
            return 0 * (outputs.final.sum() + outputs.head.weight.sum())
        return (student_coverage(outputs, codes) - codes.probability.float()).abs().sum()


def student_coverage(outputs: StudentOutputs, codes: CoveragePart) -> Tensor:
    """c_w = 1 - Π_t (1 - p_t(first token of w)) over the rows t of the word's segment that count.

    Args:
        outputs: with hidden states before the output head [B · S, d].
        codes: W words, each with its segment's number and its first token.
    Returns:
        float32 [W] in [0, 1], in the graph, not reduced.
    """
    batch = outputs.batch
    segment_N = segment_of_row(batch)

    def logits_of(flat_C: Tensor) -> Tensor:
        return outputs.head.logits(outputs.final[flat_C])

    return summary_coverage(logits_of, batch.flat, segment_N, codes.token, codes.segment, len(batch.segment_rows))


TERM = StateTerm(section=CoverageSection, kind=Kind.TASK, module=Coverage, residue=1e-3)
