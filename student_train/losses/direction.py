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
from student_train.batch import CodedBatch
from student_train.losses.config import DirectionTerm
from student_train.losses.features import in_channel_units, make_projection, student_states, teacher_states
from student_train.losses.pairing import depth_weights, state_pairs
from student_train.losses.term import Reads, Seen, StateTerm
from student_train.stream.reader import Needs

CLOSEST = 1 - 1e-6
"""arccos has no slope beyond."""
TINY = 1e-12


class Direction(StateTerm):
    """Of one tap."""

    def __init__(self, section: DirectionTerm, cache: Cache, student: PreTrainedModel, *, tap: Tap, name: str) -> None:
        super().__init__()
        self.section, self.tap = section, tap
        self.pairs = state_pairs(name, tap, cache, student)
        own = student.config.get_text_config().hidden_size
        self.projections = nn.ModuleList(make_projection(own, p.teacher_width) for p in self.pairs)
        self.reads = Reads(
            Needs(False, tuple((tap, p.teacher) for p in self.pairs), ()), tuple((tap, p.student) for p in self.pairs)
        )

    def count(self, batch: CodedBatch) -> int:
        """Sampled tokens."""
        return len(batch.hidden_flat)

    def forward(self, seen: Seen) -> Tensor:
        """Layers weighed by depth."""
        weights = depth_weights(len(self.pairs), self.section.depth_decay, seen.progress)
        total = torch.zeros((), device=seen.final.device)
        for pair, projection, weight in zip(self.pairs, self.projections, weights, strict=True):
            state = (self.tap, pair.teacher)
            with torch.autocast(seen.final.device.type, enabled=False):
                mapped = projection(student_states(seen, (self.tap, pair.student)).to(projection.weight.dtype))  # type: ignore[arg-type]
                own, other = (in_channel_units(seen, state, x) for x in (mapped, teacher_states(seen, state)))
                rows_P = direction_rows(own, other, self.section.margin_degrees, self.section.angle_weight)
                total = total + weight * rows_P.sum()
        return total


def direction_rows(a_PD: Tensor, b_PD: Tensor, margin_degrees: float, angle_weight: float) -> Tensor:
    """[P], in radians squared beyond the margin."""
    lengths_P = (a_PD.square().sum(1) + TINY).sqrt() * (b_PD.square().sum(1) + TINY).sqrt()
    cosine_P = (a_PD * b_PD).sum(1) / lengths_P
    angle_P = torch.arccos(cosine_P.clamp(-CLOSEST, CLOSEST))
    beyond_P = (angle_P - math.radians(margin_degrees)).clamp(min=0)
    return 1 - cosine_P + angle_weight * beyond_P.square()
