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
from student_train.batch import CodedBatch
from student_train.losses.config import LhsmTerm
from student_train.losses.features import make_projection, student_states, teacher_states
from student_train.losses.pairing import state_pairs
from student_train.losses.term import Reads, Seen, StateTerm
from student_train.stream.reader import Needs


class Lhsm(StateTerm):
    """See the module."""

    def __init__(self, section: LhsmTerm, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        self.pairs = state_pairs("lhsm", "block_output", cache, student)
        self.projects_teacher = section.project == "teacher"
        own = student.config.get_text_config().hidden_size
        order = -1 if self.projects_teacher else 1
        self.projections = nn.ModuleList(make_projection(*(own, p.teacher_width)[::order]) for p in self.pairs)
        self.reads = Reads(
            Needs(False, tuple(("block_output", p.teacher) for p in self.pairs), ()),
            tuple(("block_output", p.student) for p in self.pairs),
        )

    def count(self, batch: CodedBatch) -> int:
        """Sampled tokens."""
        return len(batch.hidden_flat)

    def forward(self, seen: Seen) -> Tensor:
        """Mean over layers."""
        parts = []
        for pair, projection in zip(self.pairs, self.projections, strict=True):
            ends = student_states(seen, ("block_output", pair.student)), teacher_states(seen, ("block_output", pair.teacher))
            mapped, other = ends[::-1] if self.projects_teacher else ends
            parts.append(lhsm_sum(mapped, other, projection))  # type: ignore[arg-type]
        return torch.stack(parts).mean()


def lhsm_sum(mapped_PD: Tensor, target_PE: Tensor, projection: nn.Linear) -> Tensor:
    """Σ over P sampled tokens of the mean over channels between the projected states and the others; float32 scalar, 0 (with a
    gradient of zero) where P is 0."""
    with torch.autocast(mapped_PD.device.type, enabled=False):
        mapped_PE = projection(mapped_PD.to(projection.weight.dtype))
        width = (target_PE.shape[1],)
        difference = F.layer_norm(mapped_PE, width) - F.layer_norm(target_PE.to(mapped_PE.dtype), width)
        return difference.square().mean(1).sum()
