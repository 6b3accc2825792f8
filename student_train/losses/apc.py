"""APC: attention patterns at keyword tokens (REQUIREMENTS 68).

KL(a_T ‖ a_S) = Σ_j a_T(j) (log a_T(j) - log(a_S(j) + ε)), mean over keyword rows and heads. Both are probabilities already:
no second softmax. Where the cache keeps a row's heaviest columns only, what is left over is one more outcome.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.reader import Needs
from student_train.losses.attention_rows import attention_kl, decoded_rows
from student_train.losses.config import ApcTerm
from student_train.losses.pairing import row_pairs
from student_train.losses.rows import stored_rows
from student_train.losses.term import Reads, Seen, StateTerm


class Apc(StateTerm):
    """See the module."""

    def __init__(self, _section: ApcTerm, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        layers = tuple(a.layer for a in cache.manifest.calibration.attention)
        self.pairs = row_pairs("apc", layers, cache, student)
        self.reads = Reads(Needs(False, (), layers), rows={stored_rows: tuple(p.student for p in self.pairs)})

    def count(self, batch: CodedBatch) -> int:
        """Keywords."""
        return int(batch.row_keyword.sum())

    def forward(self, seen: Seen) -> Tensor:
        """Mean over heads and layers."""
        keyword = seen.batch.row_keyword
        parts = []
        for pair in self.pairs:
            own_RGL = seen.rows[stored_rows, pair.student]
            teacher = decoded_rows(seen.batch, pair.teacher)
            if teacher is None:
                parts.append(own_RGL.sum() * 0)
                continue
            heads = seen.head_pairs[pair.teacher]
            kl_RH = attention_kl(teacher.of(keyword, [t for t, _ in heads]), own_RGL[keyword][:, [s for _, s in heads]])
            parts.append(kl_RH.mean(1).sum())
        return torch.stack(parts).mean()
