"""The rows a batch adds to the arrays of its unit, and those that follow from the unit's plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from signal_store.format.arrays import ArraySpec

Rows = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Extracted:
    """Rows by array path; and by signal, how many codes hit their limit, of how many."""

    rows: Rows
    saturated: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: "list[Extracted]") -> "Extracted":
        """All of them as one."""
        rows = {path: array for part in parts for path, array in part.rows.items()}
        return cls(rows, {name: count for part in parts for name, count in part.saturated.items()})


def numpy_of(tensor: Tensor, dtype: str) -> NDArray[np.generic]:
    """The tensor as a numpy array of a dtype; uint32 arrays come from int32 bit patterns of ids below 2**31."""
    return tensor.cpu().numpy().astype(dtype, copy=False)


def blanked(rows: Rows, specs: Mapping[str, ArraySpec], where: NDArray[np.bool_]) -> Rows:
    """The same rows with their arrays' fill value `where` [rows] a row holds no signal."""
    if not where.any():
        return rows
    return {p: np.where(where.reshape(-1, *[1] * (a.ndim - 1)), specs[p].fill, a) for p, a in rows.items()}


def typed(rows: Rows, specs: Mapping[str, ArraySpec]) -> Rows:
    """The rows in the dtypes of their arrays."""
    return {path: array.astype(specs[path].dtype, copy=False) for path, array in rows.items()}
