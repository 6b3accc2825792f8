"""A whole cache as an xarray DataTree whose arrays decode where they are looked at.

Rows stand as they are stored, unit after unit: rows that a unit does not use are NaN, or the fill value of integers; `in_use` in
each group tells them. Integer arrays and those without a decoded form are the stored ones; the distribution shows its scalars and
its head at T = 1. What decodes is a `partial` of a function of this file, so that a tree can be pickled: dask sends it to workers.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.format.arrays import FILL
from signal_view.decoded import codec_of, hidden_codecs, scalar_columns
from signal_view.extras import xarray
from signal_view.meaning import meaning

if TYPE_CHECKING:
    from signal_view.lazy_array import Decode


def to_xarray(cache: Cache) -> Any:
    """One group per group of the cache; each variable has `units` and `long_name`. Nothing is read until values are asked for."""
    specs = {spec.path: spec for part in cache.parts for spec in part.manifest.specs}
    parts: dict[str, dict[str, Any]] = {}
    for path, spec in specs.items():
        group, name = path.rsplit("/", 1)
        shape = (cache.seal.num_units * spec.capacity_rows, *spec.row_shape)
        what, unit = meaning(path)
        found = _decoded(cache, path, shape)
        if not found:
            found = {
                name: (
                    spec.dimension_names,
                    shape,
                    np.dtype(spec.dtype),
                    partial(cache.read, path),
                    {"units": unit, "long_name": what},
                )
            }
        for own, (dims, whole, dtype, decode, attributes) in found.items():
            parts.setdefault(group, {})[own] = _variable(dims, whole, dtype, decode, attributes)
    for group, variables in parts.items():
        first = next(path for path in specs if path.rsplit("/", 1)[0] == group)
        rows = cache.seal.num_units * specs[first].capacity_rows
        about = {"units": "flag", "long_name": "whether the row holds something; units have room for more than they use"}
        dims = specs[first].dimension_names[:1]
        variables["in_use"] = _variable(dims, (rows,), np.dtype(bool), partial(_in_use, cache, first), about)
    attributes = {"cache_id": cache.manifest.cache_id, "teacher": cache.manifest.teacher.name, "uri": cache.uri}
    tree = {"/": xarray().Dataset(attrs=attributes)}
    for group, variables in parts.items():
        tree[f"/{group}"] = xarray().Dataset(variables)
    return xarray().DataTree.from_dict(tree, name="cache")


Lazy = tuple[tuple[str, ...], tuple[int, ...], np.dtype[Any], "Decode", dict[str, str]]


def _decoded(cache: Cache, path: str, shape: tuple[int, ...]) -> dict[str, Lazy]:
    """By name, what stands for an array of codes; nothing for others."""
    group, name = path.rsplit("/", 1)
    float32 = np.dtype(np.float32)
    if path == "distribution/scalars":
        signal = cache.manifest.signals.distribution
        assert signal is not None
        columns = scalar_columns(np.zeros((0, shape[1]), np.float16), signal.temperatures)
        return {own: (("token",), shape[:1], float32, partial(_scalar, cache, own), about) for own, (_, about) in columns.items()}
    if path == "distribution/head_codes":
        about = {"units": "nat", "long_name": "log-probability of each id of the head, T = 1"}
        return {"head_logprob": (("token", "rank"), shape, float32, partial(_head, cache), about)}
    layouts = {h.group: h for h in cache.manifest.calibration.hidden}
    if group in layouts and name == "values":
        about = {"units": "activation", "long_name": f"{layouts[group].tap} of block {layouts[group].layer}"}
        whole = (shape[0], layouts[group].width)
        return {"state": (("row", "channel"), whole, float32, partial(_hidden, cache, group), about)}
    if group in {a.group for a in cache.manifest.calibration.attention} and name == "weights":
        about = {"units": "probability", "long_name": "attention probability of each entry"}
        return {"probability": (("entry", "head"), shape, float32, partial(_attention, cache, path), about)}
    return {}


def _in_use(cache: Cache, path: str, start: int, stop: int) -> NDArray[Any]:
    found = cache.read(path, start, stop)
    first = found.reshape(len(found), -1)[:, 0]
    used: NDArray[Any] = ~np.isnan(first) if first.dtype.kind == "f" else first != cache.array(path).fill_value
    return used


def _scalar(cache: Cache, name: str, start: int, stop: int) -> NDArray[Any]:
    signal = cache.manifest.signals.distribution
    assert signal is not None
    return scalar_columns(cache.read("distribution/scalars", start, stop), signal.temperatures)[name][0]


def _head(cache: Cache, start: int, stop: int) -> NDArray[Any]:
    import torch

    from signal_store.codecs.distribution import DistributionCodes

    ids, codes, scalars = (cache.read(f"distribution/{name}", start, stop) for name in ("head_ids", "head_codes", "scalars"))
    nothing = torch.zeros(len(ids), 0, dtype=torch.int8)
    found = DistributionCodes(
        torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(codes.astype(np.int32)), nothing, torch.from_numpy(scalars)
    )
    values: NDArray[Any] = codec_of(cache).known(found, 1.0).log_head.numpy()
    return np.where(np.isnan(scalars[:, :1].astype(np.float32)), np.nan, values)


def _hidden(cache: Cache, group: str, start: int, stop: int) -> NDArray[Any]:
    import torch

    values, scale = (torch.from_numpy(cache.read(f"{group}/{name}", start, stop)) for name in ("values", "scale"))
    decoded: NDArray[Any] = hidden_codecs(cache)[group].decode(values, scale).numpy()
    return decoded  # the scale of an unused row is NaN, and so is the row


def _attention(cache: Cache, path: str, start: int, stop: int) -> NDArray[Any]:
    import torch

    from signal_store.codecs.attention import decode_attention

    codes = cache.read(path, start, stop)
    values: NDArray[Any] = decode_attention(torch.from_numpy(codes)).numpy()
    return np.where(codes == FILL["uint8"], np.float32(np.nan), values)


def _variable(dims: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype[Any], decode: "Decode", about: dict[str, str]) -> Any:
    xr = xarray()
    from signal_view.lazy_array import lazy_array

    return xr.Variable(dims, lazy_array(shape, dtype, decode), attrs=about)
