"""An array that xarray reads piece by piece. Imports xarray at the top: import it where that is installed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

Decode = Callable[[int, int], NDArray[Any]]
"""Rows [start, stop) of the array, whole; picklable, for another process may be the one that reads."""


@dataclass(frozen=True)
class DecodedRows(BackendArray):  # type: ignore[misc, unused-ignore]
    """Rows are read in one piece, from the first that is wanted to the last; the rest is taken from them."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    decode: Decode

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._take)

    def _take(self, key: tuple[Any, ...]) -> Any:
        rows = key[0]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.shape[0])
            rows = np.arange(start, stop, step)
        wanted = np.atleast_1d(np.asarray(rows))
        if not len(wanted):
            found = np.zeros((0, *self.shape[1:]), self.dtype)
        else:
            low, high = int(wanted.min()), int(wanted.max()) + 1
            found = self.decode(low, high)[wanted - low]
        found, axis = (found[0], 0) if np.ndim(rows) == 0 else (found, 1)
        for part in key[1:]:
            found = np.take(found, np.arange(found.shape[axis])[part], axis=axis)  # a number drops its axis
            axis += np.ndim(part) > 0 or isinstance(part, slice)
        return found


def lazy_array(shape: tuple[int, ...], dtype: np.dtype[Any], decode: Decode) -> Any:
    """What an xarray Variable takes as its data."""
    return indexing.LazilyIndexedArray(DecodedRows(shape, dtype, decode))
