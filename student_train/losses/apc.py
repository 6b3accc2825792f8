"""APC: attention patterns at keyword tokens (REQUIREMENTS 68).

KL(a_T ‖ a_S) = Σ_j a_T(j) (log a_T(j) - log(a_S(j) + ε)), mean over keyword rows and heads. Both are probabilities already:
no second softmax. Where the cache keeps a row's heaviest columns only, what is left over is one more outcome. The teacher's
heads are compared with the student's own by a one-time matching, never by number (REQUIREMENTS 70).
Legend: R keyword rows, H stored heads of the teacher, G heads of the student, M stored columns, L keys of the longest row.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """`weights` float32 [R, H, M], zero where there is no entry; `columns` int64 [R, H, M], counted from the row's first key;
    `residual` float32 [R, H], mass outside the columns."""

    weights: Tensor
    columns: Tensor
    residual: Tensor

    def normalised(self) -> "TeacherRows":
        """The same rows with a total mass of exactly 1: the codes round."""
        total = (self.weights.sum(-1) + self.residual).clamp(min=EPSILON)
        return TeacherRows(self.weights / total[..., None], self.columns, self.residual / total)


def apc_rows(teacher: TeacherRows, student_RHL: Tensor, *, has_residual: bool) -> Tensor:
    """KL of each row and head [R, H], in nats; `student_RHL` holds the student's heads in the teacher's order."""
    weights, columns = teacher.weights, teacher.columns
    matched_RHM = student_RHL.gather(2, columns)
    kl_RH = (weights * (weights.clamp(min=EPSILON).log() - (matched_RHM + EPSILON).log())).sum(-1)
    if has_residual:
        kept_RHM = matched_RHM * (weights > 0)
        rest_RH = (1 - kept_RHM.sum(-1)).clamp(min=EPSILON)
        kl_RH = kl_RH + teacher.residual * (teacher.residual.clamp(min=EPSILON).log() - rest_RH.log())
    return kl_RH


@torch.no_grad()
def match_heads(teacher: TeacherRows, student_RGL: Tensor, *, has_residual: bool) -> list[tuple[int, int]]:
    """Pairs (stored head of the teacher, head of the student): the assignment with the least total KL over these rows."""
    heads, own = teacher.weights.shape[1], student_RGL.shape[1]
    cost = torch.zeros(heads, own)
    for h in range(heads):
        one = TeacherRows(teacher.weights[:, h : h + 1], teacher.columns[:, h : h + 1], teacher.residual[:, h : h + 1])
        repeated = TeacherRows(
            one.weights.expand(-1, own, -1), one.columns.expand(-1, own, -1).contiguous(), one.residual.expand(-1, own)
        )
        cost[h] = apc_rows(repeated, student_RGL, has_residual=has_residual).mean(0).cpu()
    first, second = linear_sum_assignment(cost.double().numpy())
    return [(int(a), int(b)) for a, b in zip(first, second, strict=True)]
