"""LHSM: layer-wise hidden-state matching (REQUIREMENTS 67).

mean over sampled tokens, channels and layers of (LN(P h_S) - LN(h_T))², LN without affine, P a learned bias-free linear map on
the student's side. The seed normalises the teacher only and projects the teacher; a learned map of the target reaches zero
loss without the student carrying anything (contradiction C40), and with both sides normalised a student that equals its
teacher has zero loss. In float32 whatever the autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make_projection(student_width: int, teacher_width: int) -> nn.Linear:
    """Identity where the widths agree, else orthonormal rows or columns."""
    projection = nn.Linear(student_width, teacher_width, bias=False)
    if student_width == teacher_width:
        nn.init.eye_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight)
    return projection


def lhsm_sum(student_PD: Tensor, teacher_PE: Tensor, projection: nn.Linear) -> Tensor:
    """Σ over P sampled tokens of the mean over channels; float32 scalar, 0 (with a gradient of zero) where P is 0."""
    with torch.autocast(student_PD.device.type, enabled=False):
        mapped_PE = projection(student_PD.to(projection.weight.dtype))
        width = (teacher_PE.shape[1],)
        difference = F.layer_norm(mapped_PE, width) - F.layer_norm(teacher_PE.to(mapped_PE.dtype), width)
        return difference.square().mean(1).sum()
