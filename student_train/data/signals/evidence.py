"""Which sentences of a question its answer looks at."""

from dataclasses import dataclass

import torch
from torch import Tensor

from signal_store.cache import Cache
from student_train.data.part import Part
from student_train.data.placement import Placement, joined
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class EvidencePart(Part):
    """Sentences of questions: `segment` int64 [E] number in the batch, `ranges` int64 [E, 2] first token and the one after the
    last, counted from the segment's first; `shares` float16 [E] by teacher layer."""

    segment: Tensor
    ranges: Tensor
    shares: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class EvidenceRequest(Request):
    """Teacher `layers`."""

    layers: tuple[int, ...]

    @classmethod
    def whole(cls, cache: Cache) -> "EvidenceRequest":
        """See the base."""
        return cls(cache.manifest.calibration.evidence_layers)

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return ("evidence/rows/", *(f"{name}/" for name in self.described())) if self.layers else ()

    def described(self) -> tuple[str, ...]:
        """See the base."""
        return tuple(f"evidence/{layer}" for layer in self.layers)

    def gather(self, placement: Placement) -> EvidencePart:
        """See the base."""
        rows = placement.rows("evidence")
        start = joined(placement.aligned(placement.places("evidence", rows)))
        length = placement.gathered("evidence/rows/length", rows).long()
        shares = {layer: placement.gathered(f"evidence/{layer}/share", rows) for layer in self.layers}
        return EvidencePart(placement.numbers(rows), torch.stack([start, start + length], 1), shares)
