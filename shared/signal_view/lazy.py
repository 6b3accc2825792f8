"""A whole cache as an xarray DataTree whose arrays decode where they are looked at.

Rows stand as they are stored, unit after unit: rows that a unit does not use are NaN, or the fill value of integers; `in_use` in
each group tells them. Integer arrays and those without a decoded form are the stored ones. What decodes is a `partial` of a
function, so that a tree can be pickled: dask sends it to workers.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_view.extras import xarray
from signal_view.signals import views_of
from signal_view.signals.base import Lazy, about


def to_xarray(cache: Cache) -> Any:
    """One group per group of the cache; each variable has `units` and `long_name`. Nothing is read until values are asked for."""
    specs = {spec.path: spec for part in cache.parts for spec in part.manifest.specs}
    views = views_of(cache)
    parts: dict[str, dict[str, Any]] = {}
    for path, spec in specs.items():
        group, name = path.rsplit("/", 1)
        shape = (cache.seal.num_units * spec.capacity_rows, *spec.row_shape)
        stored = Lazy(spec.dimension_names, shape, np.dtype(spec.dtype), partial(cache.read, path), about(path))
        decoded = [found for view in views if view.holds(path) for found in view.lazy(cache, path, shape).items()]
        parts.setdefault(group, {}).update({own: _variable(array) for own, array in decoded or [(name, stored)]})
    for group, variables in parts.items():
        first = next(path for path in specs if path.rsplit("/", 1)[0] == group)
        rows = cache.seal.num_units * specs[first].capacity_rows
        says = {"units": "flag", "long_name": "whether the row holds something; units have room for more than they use"}
        dims = specs[first].dimension_names[:1]
        variables["in_use"] = _variable(Lazy(dims, (rows,), np.dtype(bool), partial(_in_use, cache, first), says))
    attributes = {"cache_id": cache.manifest.cache_id, "teacher": cache.manifest.teacher.name, "uri": cache.uri}
    tree = {"/": xarray().Dataset(attrs=attributes)}
    for group, variables in parts.items():
        tree[f"/{group}"] = xarray().Dataset(variables)
    return xarray().DataTree.from_dict(tree, name="cache")


def _in_use(cache: Cache, path: str, start: int, stop: int) -> NDArray[Any]:
    found = cache.read(path, start, stop)
    first = found.reshape(len(found), -1)[:, 0]
    used: NDArray[Any] = ~np.isnan(first) if first.dtype.kind == "f" else first != cache.array(path).fill_value
    return used


def _variable(array: Lazy) -> Any:
    from signal_view.lazy_array import lazy_array

    return xarray().Variable(array.dims, lazy_array(array.shape, array.dtype, array.decode), attrs=array.about)
