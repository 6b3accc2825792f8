"""Some of many, evenly spread: which rows of a segment stand for all of them. The same in the cache and in the student."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows by group: `index` int64 [G, M] into all rows, `inside` bool [G, M]."""

    index: Tensor
    inside: Tensor

    def of(self, states_ND: Tensor) -> Tensor:
        """[G, M, D], zero outside."""
        return states_ND[self.index] * self.inside[..., None].to(states_ND.dtype)

    def to(self, device: torch.device) -> "Groups":
        """The same on a device."""
        return Groups(self.index.to(device), self.inside.to(device))


def evenly(rows_G: Tensor, most: int, least: int = 0) -> Groups:
    """At most `most` of each group's rows, which lie end to end; groups with fewer than `least` are left out.

    Its sizes depend on the values: on a GPU the host waits for them, so give it a tensor of the CPU where there is one.
    """
    most = min(most, max(1, int(rows_G.max()))) if len(rows_G) else most
    start = rows_G.cumsum(0) - rows_G
    start, rows_G = start[rows_G >= least], rows_G[rows_G >= least]
    taken = rows_G.clamp(max=most)
    place = torch.arange(most, device=rows_G.device)
    inside = place < taken[:, None]
    index = start[:, None] + place * rows_G[:, None] // taken[:, None].clamp(min=1)
    return Groups(index.where(inside, start[:, None]), inside)
