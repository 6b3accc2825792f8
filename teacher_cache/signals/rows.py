"""The rows a batch adds to the arrays of its unit."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Rows = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Extracted:
    """Rows by array path; and by array, how many codes hit their limit, of how many."""

    rows: Rows
    saturated: Mapping[str, tuple[int, int]]


def numpy_of(tensor: Tensor, dtype: str) -> NDArray[np.generic]:
    """The tensor as a numpy array of a dtype; uint32 arrays come from int32 bit patterns of ids below 2**31."""
    return tensor.cpu().numpy().astype(dtype, copy=False)
