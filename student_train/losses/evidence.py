"""Evidence: which sentences of a question the answer looks at.

KL(a_T ‖ a_S) over the sentences of a prompt, a the share of attention that each gets from the answer's rows, heads averaged; mean
over layers and over segments of sources with `task: qa`. No head is matched, and models of any number of heads compare.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.evidence import evidence_shares, shares_of
from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.evidence import EvidencePart, EvidenceRequest
from student_train.losses.kinds import Kind
from student_train.losses.pairing import row_pairs
from student_train.losses.row_queries import AnswerRows, segment_of_query
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import Reads, StateLoss, StateTerm, StudentOutputs, TermSection, not_cached

TINY = 1e-8


class EvidenceSection(TermSection):
    """KL(a_T ‖ a_S), a the share of the answer's attention that each sentence of its question gets; mean over segments of sources
    with `task: qa`."""

    weight: WeightField = constant(0.1)


class Evidence(StateLoss):
    """Shares of sentences, heads averaged."""

    def __init__(self, _section: EvidenceSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        signal, layers = cache.manifest.signals.evidence, cache.manifest.calibration.evidence_layers
        if signal is None:
            raise not_cached("evidence", "signals.evidence and a source with task: qa", cache)
        self.pairs = row_pairs("evidence", layers, cache, student)
        self.answers = AnswerRows(signal.queries)
        self.reads = Reads(
            SignalRequest.of(EvidenceRequest(layers)), rows={self.answers: tuple(dict.fromkeys(p.student for p in self.pairs))}
        )

    def count(self, batch: CodedBatch) -> int:
        """Segments with evidence."""
        part = batch.part(EvidencePart)
        return 0 if part is None else len(part.segment.unique())

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Mean over layers."""
        codes, query = outputs.batch.part(EvidencePart), outputs.queries[self.answers]
        rows = [outputs.rows[self.answers, pair.student] for pair in self.pairs]
        if codes is None or not len(codes.segment):
            return 0 * torch.stack([row.sum() for row in rows]).sum()
        segment_R, segments = segment_of_query(outputs.batch, query), len(outputs.batch.segments)
        parts = []
        for pair, own in zip(self.pairs, rows, strict=True):
            teacher_E = shares_of(codes.shares[pair.teacher].float().clamp(min=TINY), codes.segment, segments)  # the cache rounds
            student_E = evidence_shares(own, segment_R, codes.ranges, codes.segment, segments).clamp(min=TINY)
            parts.append((teacher_E * (teacher_E.log() - student_E.log())).sum())
        return torch.stack(parts).mean()


TERM = StateTerm(section=EvidenceSection, kind=Kind.TASK, module=Evidence, residue=1e-5)
