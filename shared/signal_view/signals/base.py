"""How a signal is shown: of a segment, as parts of an xarray tree; of a whole cache, what stands for its arrays of codes.

A signal that has a file here says it itself. Any other is shown as it is stored: its arrays, with the names of their dimensions and
what they mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.format.arrays import ArraySpec
from signal_view.extras import xarray
from signal_view.meaning import meaning
from signal_view.segment_rows import own_places, own_rows, row_coordinates, sampled_places, sampled_rows
from signal_view.segment_text import SegmentText


@dataclass(frozen=True, slots=True)
class Lazy:
    """What stands for an array of codes: its dimensions, shape and dtype; `decode(start, stop)` gives rows of it, and can be
    pickled; `about`: `units` and `long_name`."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    decode: Callable[[int, int], NDArray[Any]]
    about: Mapping[str, str]


def about(path: str) -> dict[str, str]:
    """`units` and `long_name` of an array."""
    what, unit = meaning(path)
    return {"units": unit, "long_name": what}


class SignalView:
    """One signal, as it is stored."""

    def __init__(self, name: str) -> None:
        self.name = name

    def holds(self, path: str) -> bool:
        """Whether an array is the signal's."""
        return path.startswith(f"{self.name}/")

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """Datasets of what a segment has of it, by their places in the tree."""
        found: dict[str, dict[str, Any]] = {}
        for part in segment.cache.parts:
            for spec in part.manifest.specs:
                group, name = spec.path.rsplit("/", 1)
                if self.holds(spec.path) and group != f"{self.name}/segments":
                    found.setdefault(f"/{group}", {})[name] = _stored(segment, self.name, spec)
        return {place: xarray().Dataset(variables) for place, variables in found.items()}

    def lazy(self, _cache: Cache, _path: str, _shape: tuple[int, ...]) -> dict[str, Lazy]:
        """By name, what stands for an array of codes, which has this shape; nothing for one that is shown as it is stored."""
        return {}


def _stored(segment: SegmentText, signal: str, spec: ArraySpec) -> Any:
    """A segment's rows of an array, as a DataArray."""
    axis, *dims = spec.dimension_names
    coordinates: dict[str, Any] = {}
    columns = dict(spec.attributes).get("columns", "").split(",")
    if dims and len(columns) == spec.row_shape[-1]:
        coordinates[dims[-1]] = columns
    if axis == "segment":
        return xarray().DataArray(segment.row_of(spec.path), dims=dims, coords=coordinates, attrs=about(spec.path))
    if axis == "entry":
        rows = _entries(segment, signal)
    elif axis == "row" and f"{signal}/rows/position" in segment.cache.capacity_rows:
        rows = sampled_rows(segment, signal)
        places = sampled_places(segment, signal, rows)
        pieces = row_coordinates(segment, places)["piece"][1]
        coordinates |= {"place": (axis, places, {"units": "token"}), "piece": (axis, pieces)}
    else:
        axis, rows, own = "token", own_rows(segment), own_places(segment)
        places = np.arange(own.start, own.stop)
        coordinates |= {"token": places, **row_coordinates(segment, places)}
    values = segment.cache.read(spec.path, rows.start, rows.stop)
    return xarray().DataArray(values, dims=(axis, *dims), coords=coordinates, attrs=about(spec.path))


def _entries(segment: SegmentText, signal: str) -> slice:
    """The entries of all the segment's rows of a ragged signal, which lie end to end."""
    rows = sampled_rows(segment, signal)
    offset, length = (segment.cache.read(f"{signal}/rows/{name}", rows.start, rows.stop) for name in ("offset", "length"))
    return slice(int(offset[0]), int(offset[-1]) + int(length[-1])) if len(offset) else slice(0, 0)


def dataset_of(frame: Any, units: Callable[[str], str], says: str) -> Any:
    """A frame as a Dataset whose columns have `units` by their names; `says` begins their long names."""
    found = xarray().Dataset.from_dataframe(frame)
    for column in frame.columns:
        found[column].attrs |= {"units": units(column), "long_name": f"{says}: {column}"}
    return found
