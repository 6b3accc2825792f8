"""The teacher's attention rows decoded, and the student's heads that they are compared with.

Heads are never compared by number: which of the student's stands for which of the teacher's is matched once.
Legend: R attention rows, H stored heads of the teacher, G heads of the student, M stored columns, L keys of the longest row.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from signal_store.codecs.attention import decode_attention
from student_train.data.batch import CodedBatch
from student_train.data.signals.attention import AttentionPart

EPSILON = 1e-8
HeadPairs = dict[int, list[tuple[int, int]]]
"""By teacher layer: (stored head of the teacher, head of the student)."""


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """`weights` float32 [R, H, M], zero where there is no entry; `columns` int64 [R, H, M], counted from the row's first key;
    `residual` float32 [R, H], mass outside the columns, or None where all are stored."""

    weights: Tensor
    columns: Tensor
    residual: Tensor | None

    def normalised(self) -> "TeacherRows":
        """The same rows with a total mass of exactly 1: the codes round."""
        total = self.weights.sum(-1) if self.residual is None else self.weights.sum(-1) + self.residual
        total = total.clamp(min=EPSILON)
        return TeacherRows(self.weights / total[..., None], self.columns, None if self.residual is None else self.residual / total)

    def of(self, rows: Tensor, heads: list[int]) -> "TeacherRows":
        """Some rows (an index or a mask) and heads of them."""
        residual = None if self.residual is None else self.residual[rows][:, heads]
        return TeacherRows(self.weights[rows][:, heads], self.columns[rows][:, heads], residual)


def decoded_rows(batch: CodedBatch, layer: int) -> TeacherRows | None:
    """The stored rows of one teacher layer, padded to the longest; None where the batch has none. float32, total mass 1."""
    part = AttentionPart.of(batch)
    if not len(part.length):
        return None
    codes, lengths_R = part.layers[layer], part.length
    columns_M = torch.arange(int(lengths_R.max()), device=lengths_R.device)
    inside_RM = columns_M < lengths_R[:, None]
    heads = codes.weights.shape[1]
    weights_RMH = torch.zeros(*inside_RM.shape, heads, device=lengths_R.device)
    weights_RMH[inside_RM] = decode_attention(codes.weights)
    if codes.columns is None:
        columns_RMH = columns_M[None, :, None].expand(len(lengths_R), -1, heads)
        residual_RH = None
    else:
        columns_RMH = torch.zeros(*inside_RM.shape, heads, dtype=torch.int64, device=lengths_R.device)
        columns_RMH[inside_RM] = codes.columns.long()
        assert codes.residual is not None
        residual_RH = codes.residual.float()
    return TeacherRows(weights_RMH.transpose(1, 2), columns_RMH.transpose(1, 2).contiguous(), residual_RH).normalised()


def attention_kl(teacher: TeacherRows, student_RHL: Tensor) -> Tensor:
    """Σ_j a_T(j) (log a_T(j) - log(a_S(j) + ε)) over a row's stored columns; what lies outside of them is one more outcome.

    Args:
        teacher: R rows of H heads, total mass 1.
        student_RHL: float [R, H, L], the student's heads in the teacher's order, probabilities, in the graph.
    Returns:
        Float [R, H], in nats, not reduced; of a row's heaviest columns alone, at most the divergence of the whole row.
    Source: Wang et al. 2020, "MiniLM", for attention distributions of matched layers.
    """
    weights = teacher.weights
    matched_RHM = student_RHL.gather(2, teacher.columns)
    kl_RH = (weights * (weights.clamp(min=EPSILON).log() - (matched_RHM + EPSILON).log())).sum(-1)
    if teacher.residual is not None:
        rest_RH = (1 - (matched_RHM * (weights > 0)).sum(-1)).clamp(min=EPSILON)
        kl_RH = kl_RH + teacher.residual * (teacher.residual.clamp(min=EPSILON).log() - rest_RH.log())
    return kl_RH


@torch.no_grad()
def match_heads(teacher: TeacherRows, student_RGL: Tensor) -> list[tuple[int, int]]:
    """The assignment of heads with the least total KL(a_T ‖ a_S) over these rows, no gradient.

    Args:
        teacher: R rows of H stored heads.
        student_RGL: float [R, G, L], all heads of the student's paired layer.
    Returns:
        min(H, G) pairs (stored head of the teacher, head of the student).
    """
    heads, own = teacher.weights.shape[1], student_RGL.shape[1]
    everywhere = torch.ones(len(student_RGL), dtype=torch.bool, device=student_RGL.device)
    cost = torch.stack([attention_kl(teacher.of(everywhere, [h] * own), student_RGL).mean(0).cpu() for h in range(heads)])
    first, second = linear_sum_assignment(cost.double().numpy())
    return [(int(a), int(b)) for a, b in zip(first, second, strict=True)]
