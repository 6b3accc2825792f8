"""Attention patterns at keyword tokens: KL(a_T ‖ a_S), mean over keyword rows and heads.

Both are probabilities already: no second softmax. Where the cache keeps a row's heaviest columns only, what is left over is one
more outcome. Heads are matched once.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.attention import AttentionPart, AttentionRequest
from student_train.losses.attention_rows import attention_kl, decoded_rows
from student_train.losses.kinds import Kind
from student_train.losses.pairing import row_pairs
from student_train.losses.row_queries import stored_rows
from student_train.losses.schedule import Weight, WeightField
from student_train.losses.term import Reads, StateLoss, StateTerm, StudentOutputs, TermSection, not_cached


class ApcSection(TermSection):
    """Attention pattern at keywords: KL(a_T ‖ a_S), mean over keyword rows and heads."""

    weight: WeightField = Weight(start=0.0, end=0.5, begin=0.2)


class Apc(StateLoss):
    """Keyword rows, head by matched head."""

    def __init__(self, _section: ApcSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        if cache.manifest.signals.attention is None:
            raise not_cached("apc", "signals.attention", cache)
        layers = tuple(a.layer for a in cache.manifest.calibration.attention)
        self.matched = row_pairs("apc", layers, cache, student)
        self.reads = Reads(SignalRequest.of(AttentionRequest(layers)), rows={stored_rows: tuple(p.student for p in self.matched)})

    def count(self, batch: CodedBatch) -> int:
        """Keywords."""
        return int(AttentionPart.of(batch).keyword.sum())

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Mean over heads and layers."""
        keyword = AttentionPart.of(outputs.batch).keyword
        parts = []
        for pair in self.matched:
            own_RGL = outputs.rows[stored_rows, pair.student]
            teacher = decoded_rows(outputs.batch, pair.teacher)
            if teacher is None:
                parts.append(own_RGL.sum() * 0)
                continue
            heads = outputs.head_pairs[pair.teacher]
            kl_RH = attention_kl(teacher.of(keyword, [t for t, _ in heads]), own_RGL[keyword][:, [s for _, s in heads]])
            parts.append(kl_RH.mean(1).sum())
        return torch.stack(parts).mean()


TERM = StateTerm(section=ApcSection, kind=Kind.IMPLICIT, module=Apc, residue=2e-3)
