"""Divergences between the teacher's softened distribution p and the student's q, row by row, with their gradients in closed form.

Each function gives (the divergence of each row [N] in nats, its gradient with respect to the student's softened logits u = z / T
[N, V]). Nothing is overwritten. The slow twin is `dense.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_FLOOR = -40.0
"""Least log-probability of the teacher, in nats, that reverse KL compares with: it would be infinite where p is zero, as in rows
that pad a student's vocabulary."""


@dataclass(frozen=True, slots=True)
class Softened:
    """A distribution of N rows at one temperature: probabilities `p` [N, V], `logits` [N, V] and the logarithm of their powers' sum
    `log_sum` [N, 1], in nats."""

    p: Tensor
    logits: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor) -> "Softened":
        """From logits, with one exponential: on a CPU these passes are what a loss costs."""
        top_N1 = logits_NV.amax(1, keepdim=True)
        p_NV = (logits_NV - top_N1).exp_()
        total_N1 = p_NV.sum(1, keepdim=True)
        return cls(p_NV.div_(total_N1), logits_NV, top_N1 + total_N1.log())

    @property
    def log(self) -> Tensor:
        """log p [N, V]."""
        return self.logits - self.log_sum


Parts = tuple[Tensor, Tensor]


def forward_kl(teacher: Softened, student: Softened) -> Parts:
    """KL(p ‖ q) = Σ p (log p - log q); gradient q - p (Hinton et al. 2015)."""
    rows_N = (teacher.logits - student.logits).mul_(teacher.p).sum(1)
    return rows_N + (student.log_sum - teacher.log_sum)[:, 0], student.p - teacher.p


def reverse_kl(teacher: Softened, student: Softened) -> Parts:
    """KL(q ‖ p) = Σ q (log q - log p); gradient q (log q - log p - KL) (MiniLLM, Gu et al. 2024)."""
    ratio_NV = student.log - teacher.log.clamp(min=LOG_FLOOR)
    rows_N = (student.p * ratio_NV).sum(1)
    return rows_N, ratio_NV.sub_(rows_N[:, None]).mul_(student.p)


def jensen_shannon(teacher: Softened, student: Softened, beta: float) -> Parts:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q; gradient (1 - β) q (log q/m - KL(q ‖ m)) (GKD, Agarwal et al. 2024)."""
    log_m_NV = torch.lerp(student.p, teacher.p, beta).clamp_(min=torch.finfo(student.p.dtype).tiny).log_()
    ratio_NV = student.log - log_m_NV
    student_N = (student.p * ratio_NV).sum(1)
    teacher_N = (teacher.log - log_m_NV).mul_(teacher.p).sum(1)
    gradient_NV = ratio_NV.sub_(student_N[:, None]).mul_(student.p).mul_(1 - beta)
    return beta * teacher_N + (1 - beta) * student_N, gradient_NV


def total_variation(teacher: Softened, student: Softened) -> Parts:
    """½ Σ |q - p|; gradient ½ q (s - Σ q s), s = sign(q - p)."""
    difference_NV = student.p - teacher.p
    rows_N = 0.5 * difference_NV.abs().sum(1)
    signed_NV = difference_NV.sign_().mul_(student.p)
    return rows_N, signed_NV.sub_(student.p * signed_NV.sum(1)[:, None]).mul_(0.5)


def divergence_of(kind: str, beta: float) -> Callable[[Softened, Softened], Parts]:
    """The function of a kind of term."""
    if kind == "jsd":
        return lambda teacher, student: jensen_shannon(teacher, student, beta)
    return {"tla": forward_kl, "reverse_kl": reverse_kl, "total_variation": total_variation}[kind]
