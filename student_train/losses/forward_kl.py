"""Alignment of logits at a temperature: T² · KL(p_T ‖ q_T), forward KL, which covers all of the teacher's modes."""

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from student_train.losses.divergence import Divergence, Parts, Softened
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import LogitsTerm, TermSection


class ForwardKlSection(TermSection):
    """Temperature-scaled alignment of logits: T² · KL(p_T ‖ q_T), mean over tokens."""

    weight: WeightField = constant(1.0)
    temperature: float = Field(3.0, gt=0)


@dataclass(frozen=True, slots=True)
class ForwardKl(Divergence):
    """KL(p ‖ q) = Σ_v p (log p - log q), in nats; gradient q - p.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", equation 2.
    """

    def closed_form(self, teacher: Softened, student: Softened) -> Parts:
        """See `Divergence`."""
        rows_N = (teacher.logits - student.logits).mul_(teacher.p).sum(1)
        return rows_N + (student.log_sum - teacher.log_sum)[:, 0], student.p - teacher.p

    def dense(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """See `Divergence`."""
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1)


TERM = LogitsTerm(section=ForwardKlSection, kind=Kind.EXPLICIT, divergence=lambda _section: ForwardKl())
