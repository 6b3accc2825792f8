"""Roles of the tokens that the rows which count predict."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from signal_store.format.roles import token_types
from student_train.data.part import Part
from student_train.data.placement import Placed, Placement
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class TagsPart(Part):
    """`types` uint8 [N] of the tokens that rows predict: places in `signal_store.format.roles.TOKEN_TYPES`."""

    types: Tensor


@dataclass(frozen=True, slots=True)
class TagsRequest(Request):
    """All of it."""

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return ("tags/",)

    def gather(self, placement: Placement) -> TagsPart:
        """See the base."""
        return TagsPart(torch.from_numpy(token_types(next_roles(placement))))


def next_roles(placement: Placement) -> NDArray[np.uint8]:
    """uint8 [N, 4]: roles of the tokens that the rows which count predict; none for a segment's last row, whose next token is
    elsewhere."""
    return np.concatenate([_next_roles(p) for p in placement.segments])


def _next_roles(p: Placed) -> NDArray[np.uint8]:
    following, length, start = p.tokens.counted + 1, p.of("length"), p.of("token_start")
    found: NDArray[np.uint8] = p.unit.rows("tags/roles")[start + np.minimum(following, length - 1)]
    found[following == length] = 0
    return found
