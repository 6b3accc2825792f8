"""The teacher's layer input from the student's layer output: what a layer gives must hold what a teacher's layer is given. A small
head g per layer, which no export holds; relative L1 in the cache's units of each channel, so that a massive channel is one among
others.
"""

from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from signal_store.cache import Cache
from student_train.losses.features import FeatureSection, PairedLoss, in_channel_units
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import StateTerm, StudentOutputs

TINY = 1e-6


class InputReconstructionSection(FeatureSection):
    """mean |g(h_S) - x_T| / mean |x_T|: a small head g rebuilds the teacher's layer input from the student's layer output, in the
    cache's units of each channel; mean over sampled tokens."""

    weight: WeightField = constant(0.1)
    width: int = Field(256, ge=1)
    """Of g's hidden layer."""


class InputReconstruction(PairedLoss):
    """A head g a pair of layers."""

    def __init__(self, section: InputReconstructionSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__("input_reconstruction", ("block_output", "block_input"), section.depth_decay, cache, student)
        self.max_tokens = section.max_tokens
        own = self.own_width
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(own), nn.Linear(own, section.width), nn.GELU(), nn.Linear(section.width, p.teacher_width))
            for p in self.pairs
        )

    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, outputs: StudentOutputs) -> Tensor:
        """Over sampled tokens."""
        target = in_channel_units(outputs, (self.tap, self.pairs[number].teacher), other_PD)
        return relative_l1(self.heads[number](own_Pd), target).sum()


def relative_l1(found_PD: Tensor, target_PD: Tensor) -> Tensor:
    """Σ_d |found - target| / Σ_d |target| of each row; 1 for a head that says nothing.

    Args:
        found_PD: float32 or float64 [P, D].
        target_PD: of the same shape and dtype.
    Returns:
        Float [P], without unit, not reduced; finite where a target is 0 throughout.
    """
    return (found_PD - target_PD).abs().mean(1) / (target_PD.abs().mean(1) + TINY)


TERM = StateTerm(section=InputReconstructionSection, kind=Kind.STRUCTURED, module=InputReconstruction, residue=None, across=True)
