"""Another tokenizer, strictly: teacher and student compared over the tokens that both have, where they stand at the same text.

What one of them says with tokens that the other lacks is one outcome more, the rest. Without it a student would be pushed away from
its own tokens, though none of them is in the loss; the cached tail makes the teacher's rest exact.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from student_train.align.vocabularies import Outcomes, Vocabularies
from student_train.data.aligned_rows import AlignedRows
from student_train.losses.across import AcrossDivergence, RowsKind, log_of_sums
from student_train.losses.divergence import Divergence, Parts, Softened
from student_train.losses.forward_kl import ForwardKl
from student_train.losses.jsd import JensenShannon
from student_train.losses.kinds import Kind
from student_train.losses.outcomes import Partition
from student_train.losses.reverse_kl import ReverseKl
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import AcrossTerm, TermSection
from student_train.losses.total_variation import TotalVariation

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "total_variation"]
DIVERGENCES: dict[DivergenceName, Divergence] = {
    "forward_kl": ForwardKl(),
    "reverse_kl": ReverseKl(),
    "jsd": JensenShannon(0.5),
    "total_variation": TotalVariation(),
}


class StrictSection(TermSection):
    """Another tokenizer: T² · D over the tokens that both have and one rest; mean over rows that stand at the same text."""

    weight: WeightField = constant(1.0)
    temperature: float = Field(1.0, gt=0)
    divergence: DivergenceName = "forward_kl"
    rows: Literal["one_to_one", "same_text"] = "one_to_one"
    """`one_to_one`: where the next tokens spell the same, too. Elsewhere a student's tokenizer may never give the token that the
    teacher's does."""


class Strict(AcrossDivergence):
    """D(p̄ ‖ q̄), p̄ and q̄ the sums of p and q over the outcomes that a `Partition` of each vocabulary makes: the common tokens, the
    rest, and ids that say nothing. Where the student cannot have an outcome, p̄ is p̄ without it.

    Source: the comparison on one-to-one positions, arXiv 2610.08448; the rest as an outcome, so that q̄ sums to 1, is ours.
    """

    def __init__(self, inner: Divergence, outcomes: Outcomes, of_rows: RowsKind) -> None:
        super().__init__()
        count = outcomes.common + 2
        self.inner, self.of_rows = inner, of_rows
        self.teacher = Partition(torch.from_numpy(outcomes.teacher), count)
        self.student = Partition(torch.from_numpy(outcomes.student), count)

    @classmethod
    def of(cls, section: StrictSection, vocabularies: Vocabularies) -> "Strict":
        """Of two vocabularies."""
        return cls(DIVERGENCES[section.divergence], vocabularies.common(), section.rows)

    def closed_form(self, teacher: Softened, student: Softened, _rows: AlignedRows) -> Parts:
        """See the base."""
        p, q = self.teacher.gather(teacher), self.student.gather(student)
        if not self.student.says_all:
            p = p.without(~self.student.possible)
        losses_B, gradient_BO = self.inner.closed_form(p, q)
        return losses_B, self.student.spread(gradient_BO, student, q)

    def dense(self, log_p_BV: Tensor, log_q_BW: Tensor, _rows: AlignedRows) -> Tensor:
        """See the base."""
        count = self.student.count
        log_p_BO, log_q_BO = log_of_sums(log_p_BV, self.teacher.outcome, count), log_of_sums(log_q_BW, self.student.outcome, count)
        possible_O = self.student.possible
        log_p_BO = log_p_BO[:, possible_O].log_softmax(1)
        return self.inner.dense(log_p_BO, log_q_BO[:, possible_O])


TERM = AcrossTerm(section=StrictSection, kind=Kind.EXPLICIT, divergence=Strict.of)
