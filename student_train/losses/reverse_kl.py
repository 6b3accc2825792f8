"""Reverse KL, T² · KL(q_T ‖ p_T), which seeks the teacher's modes."""

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from student_train.losses.divergence import Divergence, Parts, Softened
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import LogitsTerm, TermSection

LOG_FLOOR = -40.0
"""Least log-probability of the teacher, in nats, that it compares with: it would be infinite where p is zero, as in rows that pad a
student's vocabulary."""


class ReverseKlSection(TermSection):
    """T² · KL(q_T ‖ p_T), which seeks the teacher's modes; mean over tokens. log p is floored at -40 nats."""

    weight: WeightField = constant(1.0)
    temperature: float = Field(1.0, gt=0)


@dataclass(frozen=True, slots=True)
class ReverseKl(Divergence):
    """KL(q ‖ p) = Σ_v q (log q - max(log p, LOG_FLOOR)), in nats; gradient q (log q - log p - KL).

    Source: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", section 2.1.
    """

    def closed_form(self, teacher: Softened, student: Softened) -> Parts:
        """See `Divergence`."""
        ratio_NV = student.log - teacher.log.clamp(min=LOG_FLOOR)
        rows_N = (student.p * ratio_NV).sum(1)
        return rows_N, ratio_NV.sub_(rows_N[:, None]).mul_(student.p)

    def dense(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """See `Divergence`."""
        return (log_q_NV.exp() * (log_q_NV - log_p_NV.clamp(min=LOG_FLOOR))).sum(1)


TERM = LogitsTerm(section=ReverseKlSection, kind=Kind.EXPLICIT, divergence=lambda _section: ReverseKl())
