"""The teacher's layer input from the student's layer output (REQUIREMENTS 26): what a layer gives must hold what a teacher's layer
is given. A small head g per layer, which no export holds; relative L1 in the cache's units of each channel, so that a massive
channel is one among others.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.slices import State
from signal_store.cache import Cache
from student_train.batch import CodedBatch
from student_train.losses.config import InputReconstructionTerm
from student_train.losses.features import in_channel_units, student_states, teacher_states
from student_train.losses.pairing import depth_weights, state_pairs
from student_train.losses.term import Reads, Seen, StateTerm
from student_train.stream.reader import Needs

TINY = 1e-6


class InputReconstruction(StateTerm):
    """See the module."""

    def __init__(self, section: InputReconstructionTerm, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        self.section = section
        self.pairs = state_pairs("input_reconstruction", "block_input", cache, student, own_tap="block_output")
        own = student.config.get_text_config().hidden_size
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(own), nn.Linear(own, section.width), nn.GELU(), nn.Linear(section.width, p.teacher_width))
            for p in self.pairs
        )
        self.reads = Reads(
            Needs(False, tuple(("block_input", p.teacher) for p in self.pairs), ()),
            tuple(("block_output", p.student) for p in self.pairs),
        )

    def count(self, batch: CodedBatch) -> int:
        """Sampled tokens."""
        return len(batch.hidden_flat)

    def forward(self, seen: Seen) -> Tensor:
        """Layers weighed by depth."""
        weights = depth_weights(len(self.pairs), self.section.depth_decay, seen.progress)
        total = torch.zeros((), device=seen.final.device)
        for pair, head, weight in zip(self.pairs, self.heads, weights, strict=True):
            state: State = ("block_input", pair.teacher)
            with torch.autocast(seen.final.device.type, enabled=False):
                target = in_channel_units(seen, state, teacher_states(seen, state))
                found = head(student_states(seen, ("block_output", pair.student)).float())
                total = total + weight * relative_l1(found, target).sum()
        return total


def relative_l1(found_PD: Tensor, target_PD: Tensor) -> Tensor:
    """mean |found - target| / mean |target| of each row [P]; 1 for a head that says nothing."""
    return (found_PD - target_PD).abs().mean(1) / (target_PD.abs().mean(1) + TINY)
