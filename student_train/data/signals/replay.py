"""Paths of sampled tokens up the gradient of their own loss."""

from dataclasses import dataclass

from torch import Tensor

from student_train.data.part import Part
from student_train.data.placement import Placement
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class ReplayPart(Part):
    """`flat` int64 [P] where the tokens stand, `labels` int64 [P] what follows them, int8 `values` [P, K, width] in units of
    `scale` float32 [P], losses `nll` float32 [P, K + 1] in nats."""

    flat: Tensor
    labels: Tensor
    values: Tensor
    scale: Tensor
    nll: Tensor


@dataclass(frozen=True, slots=True)
class ReplayRequest(Request):
    """The paths; gradients at layers are not read."""

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return ("replay/rows/", "replay/path/")

    def gather(self, placement: Placement) -> ReplayPart:
        """See the base."""
        rows = placement.rows("replay")
        places = placement.places("replay", rows)
        return ReplayPart(
            flat=placement.flat(places),
            labels=placement.labels(places),
            values=placement.gathered("replay/path/values", rows),
            scale=placement.gathered("replay/path/scale", rows),
            nll=placement.gathered("replay/path/nll", rows),
        )
