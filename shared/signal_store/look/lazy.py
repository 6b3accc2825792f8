"""A whole cache as an xarray DataTree whose arrays decode where they are looked at.

Rows stand as they are stored, unit after unit: rows that a unit does not use are NaN, or the fill value of integers; `in_use` in
each group tells them. Integer arrays
and those without a decoded form are the stored ones; the distribution shows its scalars and its head at T = 1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.arrays import FILL
from signal_store.cache import Cache
from signal_store.look.decoded import codec_of, hidden_codecs, scalar_columns
from signal_store.look.extras import xarray
from signal_store.look.meaning import meaning

Decode = Callable[[slice], NDArray[Any]]


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
                name: (spec.dimension_names, shape, np.dtype(spec.dtype), _reader(cache, path), {"units": unit, "long_name": what})
            }
        for own, (dims, whole, dtype, decode, attributes) in found.items():
            parts.setdefault(group, {})[own] = _variable(dims, whole, dtype, decode, attributes)
    for group, variables in parts.items():
        first = next(path for path in specs if path.rsplit("/", 1)[0] == group)
        rows = cache.seal.num_units * specs[first].capacity_rows
        about = {"units": "flag", "long_name": "whether the row holds something; units have room for more than they use"}
        dims = specs[first].dimension_names[:1]
        variables["in_use"] = _variable(dims, (rows,), np.dtype(bool), _in_use(cache, first), about)
    attributes = {"cache_id": cache.manifest.cache_id, "teacher": cache.manifest.teacher.name, "uri": cache.uri}
    tree = {"/": xarray().Dataset(attrs=attributes)}
    for group, variables in parts.items():
        tree[f"/{group}"] = xarray().Dataset(variables)
    return xarray().DataTree.from_dict(tree, name="cache")


Lazy = tuple[tuple[str, ...], tuple[int, ...], np.dtype[Any], Decode, dict[str, str]]


def _reader(cache: Cache, path: str) -> Decode:
    return lambda rows: cache.read(path, rows.start, rows.stop)


def _in_use(cache: Cache, path: str) -> Decode:
    def decode(rows: slice) -> NDArray[Any]:
        found = cache.read(path, rows.start, rows.stop)
        first = found.reshape(len(found), -1)[:, 0]
        used: NDArray[Any] = ~np.isnan(first) if first.dtype.kind == "f" else first != cache.array(path).fill_value
        return used

    return decode


def _decoded(cache: Cache, path: str, shape: tuple[int, ...]) -> dict[str, Lazy]:
    """By name, what stands for an array of codes; nothing for others."""
    group, name = path.rsplit("/", 1)
    float32 = np.dtype(np.float32)
    if path == "distribution/scalars":
        signal = cache.manifest.signals.distribution
        assert signal is not None
        columns = scalar_columns(np.zeros((0, shape[1]), np.float16), signal.temperatures)

        def column(own: str) -> Decode:
            return lambda r: scalar_columns(cache.read(path, r.start, r.stop), signal.temperatures)[own][0]

        return {own: (("token",), shape[:1], float32, column(own), about) for own, (_, about) in columns.items()}
    if path == "distribution/head_codes":
        about = {"units": "nat", "long_name": "log-probability of each id of the head, T = 1"}
        return {"head_logprob": (("token", "rank"), shape, float32, _head(cache), about)}
    layouts = {h.group: h for h in cache.manifest.calibration.hidden}
    if group in layouts and name == "values":
        about = {"units": "activation", "long_name": f"{layouts[group].tap} of block {layouts[group].layer}"}
        whole = (shape[0], layouts[group].width)
        return {"state": (("row", "channel"), whole, float32, _hidden(cache, group), about)}
    if group in {a.group for a in cache.manifest.calibration.attention} and name == "weights":
        about = {"units": "probability", "long_name": "attention probability of each entry"}
        return {"probability": (("entry", "head"), shape, float32, _attention(cache, path), about)}
    return {}


def _head(cache: Cache) -> Decode:
    def decode(rows: slice) -> NDArray[Any]:
        import torch

        from signal_store.distribution_codec import DistributionCodes

        ids, codes, scalars = (
            cache.read(f"distribution/{name}", rows.start, rows.stop) for name in ("head_ids", "head_codes", "scalars")
        )
        nothing = torch.zeros(len(ids), 0, dtype=torch.int8)
        found = DistributionCodes(
            torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(codes.astype(np.int32)), nothing, torch.from_numpy(scalars)
        )
        values: NDArray[Any] = codec_of(cache).known(found, 1.0).log_head.numpy()
        return np.where(np.isnan(scalars[:, :1].astype(np.float32)), np.nan, values)

    return decode


def _hidden(cache: Cache, group: str) -> Decode:
    def decode(rows: slice) -> NDArray[Any]:
        import torch

        values, scale = (torch.from_numpy(cache.read(f"{group}/{name}", rows.start, rows.stop)) for name in ("values", "scale"))
        decoded: NDArray[Any] = hidden_codecs(cache)[group].decode(values, scale).numpy()
        return decoded  # the scale of an unused row is NaN, and so is the row

    return decode


def _attention(cache: Cache, path: str) -> Decode:
    def decode(rows: slice) -> NDArray[Any]:
        import torch

        from signal_store.attention_codec import decode_attention

        codes = cache.read(path, rows.start, rows.stop)
        values: NDArray[Any] = decode_attention(torch.from_numpy(codes)).numpy()
        return np.where(codes == FILL["uint8"], np.float32(np.nan), values)

    return decode


def _variable(dims: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype[Any], decode: Decode, about: dict[str, str]) -> Any:
    xr = xarray()
    return xr.Variable(dims, _lazy_array(shape, dtype, decode), attrs=about)


def _lazy_array(shape: tuple[int, ...], dtype: np.dtype[Any], decode: Decode) -> Any:
    """What xarray indexes lazily: rows are read in one piece, the rest is taken from them."""
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class Decoded(BackendArray):  # type: ignore[misc, unused-ignore]
        """See the function."""

        def __init__(self) -> None:
            self.shape, self.dtype = shape, dtype

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
                found = decode(slice(low, high))[wanted - low]
            found, axis = (found[0], 0) if np.ndim(rows) == 0 else (found, 1)
            for part in key[1:]:
                found = np.take(found, np.arange(found.shape[axis])[part], axis=axis)  # a number drops its axis
                axis += np.ndim(part) > 0 or isinstance(part, slice)
            return found

    return indexing.LazilyIndexedArray(Decoded())
