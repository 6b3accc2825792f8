"""Directions of features: cosine and an angular margin (REQUIREMENTS 24), of one slice: the attention's output before the residual
is added, or the normalised input of the FFN.

1 - cos θ + λ · max(0, θ - θ₀)², θ between P h_S and h_T, both in the cache's units of each channel; P learned, on the student's
side (FitNets, Romero et al. 2015). In float32 throughout: in bfloat16 the gradient at zero is not finite.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from signal_store.cache import Cache
from signal_store.signals import Tap
from student_train.losses.config import DirectionTerm
from student_train.losses.features import PairedTerm, in_channel_units, make_projection
from student_train.losses.term import Seen

CLOSEST = 1 - 1e-6
"""arccos has no slope beyond."""
TINY = 1e-12


class Direction(PairedTerm):
    """Of one tap."""

    def __init__(self, section: DirectionTerm, cache: Cache, student: PreTrainedModel, *, tap: Tap, name: str) -> None:
        super().__init__(name, (tap, tap), section.depth_decay, cache, student)
        self.section, self.max_tokens = section, section.max_tokens
        self.projections = nn.ModuleList(make_projection(self.own_width, p.teacher_width) for p in self.pairs)

    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, seen: Seen) -> Tensor:
        """See the module."""
        state = (self.tap, self.pairs[number].teacher)
        own, other = (in_channel_units(seen, state, x) for x in (self.projections[number](own_Pd), other_PD))
        return direction_rows(own, other, self.section.margin_degrees, self.section.angle_weight).sum()


def direction_rows(a_PD: Tensor, b_PD: Tensor, margin_degrees: float, angle_weight: float) -> Tensor:
    """[P], in radians squared beyond the margin."""
    lengths_P = (a_PD.square().sum(1) + TINY).sqrt() * (b_PD.square().sum(1) + TINY).sqrt()
    cosine_P = (a_PD * b_PD).sum(1) / lengths_P
    angle_P = torch.arccos(cosine_P.clamp(-CLOSEST, CLOSEST))
    beyond_P = (angle_P - math.radians(margin_degrees)).clamp(min=0)
    return 1 - cosine_P + angle_weight * beyond_P.square()
