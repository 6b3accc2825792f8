"""The generalised Jensen-Shannon divergence, between forward KL (β → 1) and reverse KL (β → 0), and bounded."""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from student_train.losses.divergence import Divergence, Parts, Softened
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import LogitsTerm, TermSection


class JsdSection(TermSection):
    """T² · (β KL(p_T ‖ m) + (1 - β) KL(q_T ‖ m)), m = β p_T + (1 - β) q_T: generalised Jensen-Shannon; mean over tokens."""

    weight: WeightField = constant(1.0)
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.5, gt=0, lt=1)


@dataclass(frozen=True, slots=True)
class JensenShannon(Divergence):
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q, in nats; gradient (1 - β) q (log q/m - KL(q ‖ m)).

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), equation 1.
    """

    beta: float

    def closed_form(self, teacher: Softened, student: Softened) -> Parts:
        """See `Divergence`."""
        log_m_NV = torch.lerp(student.p, teacher.p, self.beta).clamp_(min=torch.finfo(student.p.dtype).tiny).log_()
        ratio_NV = student.log - log_m_NV
        student_N = (student.p * ratio_NV).sum(1)
        teacher_N = (teacher.log - log_m_NV).mul_(teacher.p).sum(1)
        gradient_NV = ratio_NV.sub_(student_N[:, None]).mul_(student.p).mul_(1 - self.beta)
        return self.beta * teacher_N + (1 - self.beta) * student_N, gradient_NV

    def dense(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """See `Divergence`."""
        p, q = log_p_NV.exp(), log_q_NV.exp()
        log_m = (self.beta * p + (1 - self.beta) * q).log()
        return (self.beta * p * (log_p_NV - log_m) + (1 - self.beta) * q * (log_q_NV - log_m)).sum(1)


TERM = LogitsTerm(section=JsdSection, kind=Kind.EXPLICIT, divergence=lambda section: JensenShannon(section.beta))
