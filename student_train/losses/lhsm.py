"""LHSM: layer-wise hidden-state matching (REQUIREMENTS 67).

mean over sampled tokens, channels and layers of (LN(P h_S) - LN(h_T))², LN without affine, P a learned bias-free linear map on
the student's side. The seed normalises the teacher only and projects the teacher; a learned map of the target reaches zero
loss without the student carrying anything (contradiction C40), and with both sides normalised a student that equals its
teacher has zero loss. In float32 whatever the autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from signal_store.cache import Cache
from student_train.losses.config import LhsmTerm
from student_train.losses.features import PairedTerm, make_projection
from student_train.losses.term import Seen


class Lhsm(PairedTerm):
    """See the module; layers weigh alike."""

    def __init__(self, section: LhsmTerm, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__("lhsm", ("block_output", "block_output"), 1.0, cache, student)
        self.projects_teacher = section.project == "teacher"
        order = -1 if self.projects_teacher else 1
        self.projections = nn.ModuleList(make_projection(*(self.own_width, p.teacher_width)[::order]) for p in self.pairs)

    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, _seen: Seen) -> Tensor:
        """See the module."""
        mapped, other = (other_PD, own_Pd) if self.projects_teacher else (own_Pd, other_PD)
        return lhsm_sum(mapped, other, self.projections[number])  # type: ignore[arg-type]


def lhsm_sum(mapped_PD: Tensor, target_PE: Tensor, projection: nn.Linear) -> Tensor:
    """Σ over P sampled tokens of the mean over channels between the projected states and the others; float32 scalar, 0 (with a
    gradient of zero) where P is 0."""
    with torch.autocast(mapped_PD.device.type, enabled=False):
        mapped_PE = projection(mapped_PD.to(projection.weight.dtype))
        width = (target_PE.shape[1],)
        difference = F.layer_norm(mapped_PE, width) - F.layer_norm(target_PE.to(mapped_PE.dtype), width)
        return difference.square().mean(1).sum()
