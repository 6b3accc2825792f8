"""Total variation, T² · ½ Σ |q_T - p_T|: bounded, and deaf to how far off a wrong token is."""

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from student_train.losses.divergence import Divergence, Parts, Softened
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import LogitsTerm, TermSection


class TotalVariationSection(TermSection):
    """T² · ½ Σ |q_T - p_T|, mean over tokens."""

    weight: WeightField = constant(1.0)
    temperature: float = Field(1.0, gt=0)


@dataclass(frozen=True, slots=True)
class TotalVariation(Divergence):
    """½ Σ_v |q - p|, in [0, 1]; gradient ½ q (s - Σ q s), s = sign(q - p).

    Source: Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", section 3.
    """

    def closed_form(self, teacher: Softened, student: Softened) -> Parts:
        """See `Divergence`."""
        difference_NV = student.p - teacher.p
        rows_N = 0.5 * difference_NV.abs().sum(1)
        signed_NV = difference_NV.sign_().mul_(student.p)
        return rows_N, signed_NV.sub_(student.p * signed_NV.sum(1)[:, None]).mul_(0.5)

    def dense(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """See `Divergence`."""
        p, q = log_p_NV.exp(), log_q_NV.exp()
        return 0.5 * (q - p).abs().sum(1)


TERM = LogitsTerm(section=TotalVariationSection, kind=Kind.EXPLICIT, divergence=lambda _section: TotalVariation())
