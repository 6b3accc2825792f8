"""The teacher's layer input from the student's layer output (REQUIREMENTS 26): what a layer gives must hold what a teacher's layer
is given. A small head g per layer, which no export holds; relative L1 in the cache's units of each channel, so that a massive
channel is one among others.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from signal_store.cache import Cache
from student_train.losses.config import InputReconstructionTerm
from student_train.losses.features import PairedTerm, in_channel_units
from student_train.losses.term import Seen

TINY = 1e-6


class InputReconstruction(PairedTerm):
    """See the module."""

    def __init__(self, section: InputReconstructionTerm, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__("input_reconstruction", ("block_output", "block_input"), section.depth_decay, cache, student)
        self.max_tokens = section.max_tokens
        own = self.own_width
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(own), nn.Linear(own, section.width), nn.GELU(), nn.Linear(section.width, p.teacher_width))
            for p in self.pairs
        )

    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, seen: Seen) -> Tensor:
        """See the module."""
        target = in_channel_units(seen, (self.tap, self.pairs[number].teacher), other_PD)
        return relative_l1(self.heads[number](own_Pd), target).sum()


def relative_l1(found_PD: Tensor, target_PD: Tensor) -> Tensor:
    """mean |found - target| / mean |target| of each row [P]; 1 for a head that says nothing."""
    return (found_PD - target_PD).abs().mean(1) / (target_PD.abs().mean(1) + TINY)
