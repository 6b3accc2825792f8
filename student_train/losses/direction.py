"""Directions of features: cosine and an angular margin, of one slice.

1 - cos θ + λ · max(0, θ - θ₀)², θ between P h_S and h_T, both in the cache's units of each channel; P learned, on the student's
side. In float32 throughout: in bfloat16 the gradient at zero is not finite.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from signal_store.cache import Cache
from signal_store.signals import Tap
from student_train.losses.features import FeatureSection, PairedLoss, in_channel_units, make_projection
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import StudentOutputs

CLOSEST = 1 - 1e-6
"""arccos has no slope beyond."""
TINY = 1e-12


class DirectionSection(FeatureSection):
    """1 - cos θ + λ · max(0, θ - θ₀)² between P h_S and h_T, in the cache's units of each channel; mean over sampled tokens."""

    weight: WeightField = constant(0.2)
    margin_degrees: float = Field(30.0, ge=0, lt=180)
    angle_weight: float = Field(1.0, ge=0)


class Direction(PairedLoss):
    """Base of the terms that compare the directions of one tap."""

    name: ClassVar[str]
    at: ClassVar[Tap]

    def __init__(self, section: DirectionSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__(self.name, (self.at, self.at), section.depth_decay, cache, student)
        self.section, self.max_tokens = section, section.max_tokens
        self.projections = nn.ModuleList(make_projection(self.own_width, p.teacher_width) for p in self.pairs)

    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, outputs: StudentOutputs) -> Tensor:
        """Over sampled tokens."""
        state = (self.tap, self.pairs[number].teacher)
        own, other = (in_channel_units(outputs, state, x) for x in (self.projections[number](own_Pd), other_PD))
        return direction_rows(own, other, self.section.margin_degrees, self.section.angle_weight).sum()


def direction_rows(a_PD: Tensor, b_PD: Tensor, margin_degrees: float, angle_weight: float) -> Tensor:
    """1 - cos θ_p + λ · max(0, θ_p - θ₀)², θ_p the angle between a_p and b_p in radians.

    Args:
        a_PD: float32 or float64 [P, D]; a vector of zeros has cosine 0.
        b_PD: of the same shape and dtype.
        margin_degrees: θ₀, in [0, 180).
        angle_weight: λ, per radian².
    Returns:
        Float [P], at least 0, not reduced. Cosines beyond ±(1 - 1e-6) give the angle there, where its slope is finite.
    Source: the learned map and squared error of Romero et al. 2015, "FitNets", equation 3, with angles for distances.
    """
    lengths_P = (a_PD.square().sum(1) + TINY).sqrt() * (b_PD.square().sum(1) + TINY).sqrt()
    cosine_P = (a_PD * b_PD).sum(1) / lengths_P
    angle_P = torch.arccos(cosine_P.clamp(-CLOSEST, CLOSEST))
    beyond_P = (angle_P - math.radians(margin_degrees)).clamp(min=0)
    return 1 - cosine_P + angle_weight * beyond_P.square()
