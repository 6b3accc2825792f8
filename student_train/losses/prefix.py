"""Another tokenizer, by beginnings of tokens: the mass of each of the teacher's tokens goes to the student's longest token that
begins it.

Where the student stands inside a token of the teacher's, p is that of the tokens which begin with what is spoken already, and only
what follows is mapped. This needs the whole distribution: the tokens that begin alike are seldom among the likeliest few.
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from signal_store.codecs.distribution import PADDED_LOGIT
from student_train.align.vocabularies import Vocabularies
from student_train.data.aligned_rows import AlignedRows
from student_train.losses.across import AcrossDivergence, RowsKind
from student_train.losses.divergence import Divergence, Parts, Softened
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.strict import DIVERGENCES, DivergenceName
from student_train.losses.term import AcrossTerm, TermSection

MOST_SPOKEN = 24
"""Symbols of a token that may be spoken already; rows that know more of it do not count."""


class PrefixSection(TermSection):
    """Another tokenizer: T² · D(t ‖ q), t(u) = Σ p(v) over the teacher's tokens v that u is the longest beginning of; mean over
    rows whose next token ends no later than the teacher's."""

    weight: WeightField = constant(1.0)
    temperature: float = Field(1.0, gt=0)
    divergence: DivergenceName = "forward_kl"


class Prefix(AcrossDivergence):
    """s · D(t / s ‖ q), t(u) = Σ_{v : φ(v) = u} p(v | v begins with what is spoken), s = Σ t: what is not lost on tokens that no
    token of the student begins.

    `place` int64 [V]: of each of the teacher's tokens among all, sorted by what they spell. `begins` int32 [n, V]: φ, by symbols
    that are spoken; W where there is none.
    Source: byte-prefix marginals, arXiv 2607.22334; the weight s is ours.
    """

    of_rows: RowsKind = "within"
    place: Tensor
    begins: Tensor

    def __init__(self, inner: Divergence, vocabularies: Vocabularies) -> None:
        super().__init__()
        longest = min(MOST_SPOKEN, max(1, *map(len, vocabularies.teacher.symbols)) - 1)
        self.inner, self.width = inner, vocabularies.rows
        begins = np.stack([vocabularies.beginning(spoken) for spoken in range(longest + 1)])
        self.register_buffer("place", torch.from_numpy(vocabularies.sorted_places()), persistent=False)
        self.register_buffer("begins", torch.from_numpy(begins), persistent=False)

    def counts(self, rows: AlignedRows) -> Tensor:
        """See the base."""
        return super().counts(rows) & (rows.spoken < len(self.begins))

    def target(self, p_BV: Tensor, rows: AlignedRows) -> Tensor:
        """t [B, W + 1]: what goes to each of the student's tokens, and what goes to none."""
        begins_alike_BV = (self.place >= rows.first[:, None]) & (self.place < rows.last[:, None])
        given_BV = p_BV * begins_alike_BV
        given_BV = given_BV / given_BV.sum(1, keepdim=True).clamp(min=torch.finfo(p_BV.dtype).tiny)
        target = p_BV.new_zeros(len(p_BV), self.width + 1)
        for spoken in rows.spoken.unique().tolist():
            if spoken < len(self.begins):
                some = rows.spoken == spoken
                target[some] = target[some].index_add_(1, self.begins[spoken], given_BV[some])
        return target

    def closed_form(self, teacher: Softened, student: Softened, rows: AlignedRows) -> Parts:
        """See the base."""
        target = self.target(teacher.p, rows)[:, :-1]
        kept_B1 = target.sum(1, keepdim=True)
        t_BW = target / kept_B1.clamp(min=torch.finfo(target.dtype).tiny)
        known = Softened(t_BW, t_BW.log().clamp_(min=PADDED_LOGIT), t_BW.new_zeros(len(t_BW), 1))
        losses_B, gradient_BW = self.inner.closed_form(known, student)
        return losses_B * kept_B1[:, 0], gradient_BW.mul_(kept_B1)

    def dense(self, log_p_BV: Tensor, log_q_BW: Tensor, rows: AlignedRows) -> Tensor:
        """See the base."""
        target = torch.zeros_like(log_q_BW)
        for row, p_V in enumerate(log_p_BV.exp()):
            spoken, first, last = int(rows.spoken[row]), int(rows.first[row]), int(rows.last[row])
            if spoken >= len(self.begins):
                continue
            alike = [v for v in range(len(p_V)) if first <= int(self.place[v]) < last]
            mass = sum(p_V[v] for v in alike)
            for v in alike:
                if (token := int(self.begins[spoken][v])) < self.width:
                    target[row, token] += p_V[v] / mass
        kept_B = target.sum(1)
        log_t_BW = (target / kept_B[:, None].clamp(min=torch.finfo(target.dtype).tiny)).log().clamp(min=PADDED_LOGIT)
        return kept_B * self.inner.dense(log_t_BW, log_q_BW)


TERM = AcrossTerm(
    section=PrefixSection, kind=Kind.EXPLICIT, divergence=lambda section, both: Prefix(DIVERGENCES[section.divergence], both)
)
