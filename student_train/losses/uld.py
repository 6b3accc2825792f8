"""Universal logit distillation: sorted probabilities, whatever they are of. A baseline: it cannot tell one token from another."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from student_train.data.aligned_rows import AlignedRows
from student_train.losses.across import AcrossDivergence, RowsKind
from student_train.losses.divergence import Parts, Softened
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import AcrossTerm, TermSection


class UldSection(TermSection):
    """Another tokenizer: T² · Σ_k |p_(k) - q_(k)| over probabilities in descending order; mean over rows at the same text."""

    weight: WeightField = constant(1.0)
    temperature: float = Field(1.0, gt=0)


class Uld(AcrossDivergence):
    """Σ_k |p_(k) - q_(k)|, the shorter list filled with zeros; gradient q (s - Σ q s), s = sign(q - p) at the token's rank.

    Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss", equation 5.
    """

    of_rows: RowsKind = "same_text"

    def closed_form(self, teacher: Softened, student: Softened, _rows: AlignedRows) -> Parts:
        """See the base."""
        q_BK, token_BW = student.p.sort(1, descending=True)
        difference_BK = _same_width(q_BK, teacher.p.sort(1, descending=True).values)
        losses_B = difference_BK.abs().sum(1)
        sign_BW = difference_BK[:, : q_BK.shape[1]].sign_()
        gradient_BW = student.p * student.p.new_zeros(student.p.shape).scatter_(1, token_BW, sign_BW)
        return losses_B, gradient_BW.sub_(student.p * gradient_BW.sum(1, keepdim=True))

    def dense(self, log_p_BV: Tensor, log_q_BW: Tensor, _rows: AlignedRows) -> Tensor:
        """See the base."""
        p_BV, q_BW = (found.exp().sort(1, descending=True).values for found in (log_p_BV, log_q_BW))
        return _same_width(q_BW, p_BV).abs().sum(1)


def _same_width(q_BW: Tensor, p_BV: Tensor) -> Tensor:
    """Their difference, the narrower filled with zeros."""
    width = max(q_BW.shape[1], p_BV.shape[1])
    return F.pad(q_BW, (0, width - q_BW.shape[1])) - F.pad(p_BV, (0, width - p_BV.shape[1]))


TERM = AcrossTerm(section=UldSection, kind=Kind.EXPLICIT, divergence=lambda _section, _vocabularies: Uld())
