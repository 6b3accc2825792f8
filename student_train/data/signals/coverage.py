"""Which key words of a text its summary says."""

from dataclasses import dataclass

from torch import Tensor

from student_train.data.part import Part
from student_train.data.placement import Placement
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class CoveragePart(Part):
    """Key words: `segment` int64 [W] number in the batch, `token` int64 [W], `probability` float16 [W] that it is said."""

    segment: Tensor
    token: Tensor
    probability: Tensor


@dataclass(frozen=True, slots=True)
class CoverageRequest(Request):
    """All of it."""

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return ("coverage/rows/", "coverage/words/")

    def gather(self, placement: Placement) -> CoveragePart:
        """See the base."""
        rows = placement.rows("coverage")
        token = placement.gathered("coverage/rows/token", rows).long()
        return CoveragePart(placement.numbers(rows), token, placement.gathered("coverage/words/probability", rows))
