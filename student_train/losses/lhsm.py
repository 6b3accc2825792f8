"""LHSM: layer-wise hidden-state matching (REQUIREMENTS 67).

mean over sampled tokens, channels and layers of (LN(P h_S) - LN(h_T))², LN without affine, P a learned bias-free linear map on
the student's side. The seed normalises the teacher only and projects the teacher; a learned map of the target reaches zero
loss without the student carrying anything (contradiction C40), and with both sides normalised a student that equals its
teacher has zero loss. In float32 whatever the autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make_projection(width: int, target_width: int) -> nn.Linear:
    """Identity where the widths agree, else orthonormal rows or columns."""
    projection = nn.Linear(width, target_width, bias=False)
    if width == target_width:
        nn.init.eye_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight)
    return projection


def lhsm_sum(mapped_PD: Tensor, target_PE: Tensor, projection: nn.Linear) -> Tensor:
    """Σ over P sampled tokens of the mean over channels between the projected states and the others; float32 scalar, 0 (with a
    gradient of zero) where P is 0."""
    with torch.autocast(mapped_PD.device.type, enabled=False):
        mapped_PE = projection(mapped_PD.to(projection.weight.dtype))
        width = (target_PE.shape[1],)
        difference = F.layer_norm(mapped_PE, width) - F.layer_norm(target_PE.to(mapped_PE.dtype), width)
        return difference.square().mean(1).sum()
