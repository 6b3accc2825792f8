"""The zarr metadata of a cache: what zarr itself writes of its arrays, consolidated. Apart from `arrays`, which recipes import: a
command line that only says its help waits for no zarr.
"""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
import zarr.codecs
from zarr.abc.buffer import Buffer
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from signal_store.format.arrays import ArraySpec


def create_array(store: Store, spec: ArraySpec, num_rows: int) -> None:
    """Write the zarr metadata of an array of `num_rows` rows with zarr itself."""
    zarr.create_array(
        store,
        name=spec.path,
        shape=(num_rows, *spec.row_shape),
        dtype=spec.dtype,
        chunks=(spec.chunk_rows, *spec.row_shape),
        shards=(spec.shard_rows, *spec.row_shape),
        compressors=[
            zarr.codecs.BloscCodec(cname="zstd", clevel=spec.level, shuffle=spec.shuffle, typesize=np.dtype(spec.dtype).itemsize),
            zarr.codecs.Crc32cCodec(),
        ],
        filters=[zarr.codecs.TransposeCodec(order=(1, 0))] if spec.transposed else None,
        fill_value=spec.fill,
        dimension_names=spec.dimension_names,
        attributes={**dict(spec.attributes), "_FillValue": _fill_attribute(spec)},
        zarr_format=3,
    )


def _fill_attribute(spec: ArraySpec) -> Any:
    """`_FillValue` as xarray's zarr backend spells it: base64 of a little-endian double for floats, a number for integers."""
    if np.dtype(spec.dtype).kind == "f":
        return "AAAAAAAA+H8="
    return int(spec.fill)


def hierarchy_metadata(arrays: Mapping[ArraySpec, int], root_attributes: Mapping[str, str]) -> dict[str, bytes]:
    """Every `zarr.json` of the hierarchy, consolidated in the root, by key. `arrays` gives the number of rows of each.

    Pure: zarr itself writes them, into memory.
    """
    return dict(_hierarchy_metadata(tuple(arrays.items()), tuple(sorted(root_attributes.items()))))


@functools.lru_cache(maxsize=8)
def _hierarchy_metadata(
    arrays: tuple[tuple[ArraySpec, int], ...], root_attributes: tuple[tuple[str, str], ...]
) -> Mapping[str, bytes]:
    written: dict[str, Buffer] = {}
    store = MemoryStore(written)
    zarr.open_group(store, mode="w", zarr_format=3, attributes=dict(root_attributes))
    for spec, num_rows in arrays:
        create_array(store, spec, num_rows)
    with warnings.catch_warnings():  # zarr warns that consolidated metadata is not yet in the v3 specification
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store, zarr_format=3)
    return {key: written[key].to_bytes() for key in sorted(written) if key.endswith("zarr.json")}
