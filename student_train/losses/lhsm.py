"""Layer-wise hidden-state matching: (LN(P h_S) - LN(h_T))², LN without affine, P a learned bias-free linear map on the student's
side.

A learned map of the target would reach zero loss without the student carrying anything, and with both sides normalised a student
that equals its teacher has zero loss. In float32 whatever the autocast.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from signal_store.cache import Cache
from student_train.losses.features import PairedLoss, make_projection
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import StateTerm, StudentOutputs, TermSection, not_cached


class LhsmSection(TermSection):
    """Layer-wise hidden-state matching: mean squared difference of LayerNorm(P h_S) and LayerNorm(h_T); or P on the teacher's."""

    weight: WeightField = constant(0.8)
    project: Literal["student", "teacher"] = "student"
    """Whose states the learned map is applied to, onto the width of the other's."""


class Lhsm(PairedLoss):
    """P of every pair of layers; layers weigh alike."""

    def __init__(self, section: LhsmSection, cache: Cache, student: PreTrainedModel) -> None:
        if cache.manifest.signals.hidden is None:
            raise not_cached("lhsm", "signals.hidden", cache)
        super().__init__("lhsm", ("block_output", "block_output"), 1.0, cache, student)
        self.projects_teacher = section.project == "teacher"
        order = -1 if self.projects_teacher else 1
        self.projections = nn.ModuleList(make_projection(*(self.own_width, p.teacher_width)[::order]) for p in self.pairs)

    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, _outputs: StudentOutputs) -> Tensor:
        """Over sampled tokens."""
        mapped, other = (other_PD, own_Pd) if self.projects_teacher else (own_Pd, other_PD)
        return lhsm_sum(mapped, other, self.projections[number])  # type: ignore[arg-type]


def lhsm_sum(mapped_PD: Tensor, target_PE: Tensor, projection: nn.Linear) -> Tensor:
    """Σ_p 1/E Σ_e (LN(W x_p)_e - LN(y_p)_e)², LN(v) = (v - mean v) / √(var v + 1e-5).

    Args:
        mapped_PD: x, states of P sampled tokens [P, D], any float dtype; P may be 0.
        target_PE: y, the other side's [P, E].
        projection: W [E, D]; its dtype is what is computed in.
    Returns:
        Scalar in that dtype, without unit: sum over tokens, mean over channels; 0 with a gradient of 0 where P is 0.
    Source: Jiao et al. 2020, "TinyBERT", equation 8, with both sides normalised.
    """
    with torch.autocast(mapped_PD.device.type, enabled=False):
        mapped_PE = projection(mapped_PD.to(projection.weight.dtype))
        width = (target_PE.shape[1],)
        difference = F.layer_norm(mapped_PE, width) - F.layer_norm(target_PE.to(mapped_PE.dtype), width)
        return difference.square().mean(1).sum()


TERM = StateTerm(section=LhsmSection, kind=Kind.STRUCTURED, module=Lhsm, residue=1e-5, across=True)
