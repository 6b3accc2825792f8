"""Attention rows of keyword tokens, decoded."""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.errors import MismatchError
from signal_store.format.arrays import FILL
from signal_view.extras import xarray
from signal_view.segment_rows import row_coordinates, sampled_places, sampled_rows
from signal_view.segment_text import SegmentText
from signal_view.signals.base import Lazy, SignalView


class AttentionView(SignalView):
    """Rows of each layer."""

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """See the base."""
        held = segment.cache.manifest.calibration.attention
        return {f"/{a.group}": attention(segment, a.layer).to_dataset(name="probability") for a in held}

    def lazy(self, cache: Cache, path: str, shape: tuple[int, ...]) -> dict[str, Lazy]:
        """See the base."""
        if path not in {f"{layout.group}/weights" for layout in cache.manifest.calibration.attention}:
            return {}
        about = {"units": "probability", "long_name": "attention probability of each entry"}
        return {"probability": Lazy(("entry", "head"), shape, np.dtype(np.float32), partial(_probabilities, cache, path), about)}


def attention(segment: SegmentText, layer: int) -> Any:
    """DataArray [token, head, key] float32: probabilities of the stored rows over the segment's keys, NaN where nothing is stored
    (keys after the row's own token, and those left out of a row that keeps its heaviest only, whose sum is in `residual`)."""
    import torch

    from signal_store.codecs.attention import decode_attention

    cache = segment.cache
    layouts = {a.layer: a for a in cache.manifest.calibration.attention}
    if layer not in layouts:
        held = ", ".join(map(str, layouts)) or "no attention"
        raise MismatchError("the cache does not hold this layer's attention", expected=held, found=layer, where=cache.uri)
    layout = layouts[layer]
    rows = sampled_rows(segment, "attention")
    places = sampled_places(segment, "attention", rows)
    offset, length, keyword = (
        cache.read(f"attention/rows/{name}", rows.start, rows.stop).astype(np.int64) for name in ("offset", "length", "keyword")
    )
    found = np.full((len(places), len(layout.head_ids), len(segment)), np.nan, np.float32)
    for row, (first, count) in enumerate(zip(offset.tolist(), length.tolist(), strict=True)):
        codes = decode_attention(torch.from_numpy(cache.read(f"{layout.group}/weights", first, first + count))).numpy()
        if layout.max_columns is None:
            found[row, :, :count] = codes.T
        else:
            columns = cache.read(f"{layout.group}/columns", first, first + count).astype(np.int64)
            found[row, np.arange(len(layout.head_ids))[None], columns] = codes
    coordinates: dict[str, Any] = {
        "token": places,
        "head": list(layout.head_ids),
        "key": np.arange(len(segment)),
        "key_piece": ("key", np.asarray(segment.tokens, dtype=object)),
        "keyword": ("token", keyword == 1),
        **row_coordinates(segment, places),
    }
    if layout.max_columns is not None:
        residual = cache.read(f"{layout.group}/residual", rows.start, rows.stop).astype(np.float32)
        coordinates["residual"] = (("token", "head"), residual, {"units": "probability"})
    return xarray().DataArray(
        found,
        dims=("token", "head", "key"),
        coords=coordinates,
        name=f"attention_{layer}",
        attrs={"units": "probability", "long_name": f"attention of block {layer}"},
    )


def _probabilities(cache: Cache, path: str, start: int, stop: int) -> NDArray[Any]:
    import torch

    from signal_store.codecs.attention import decode_attention

    codes = cache.read(path, start, stop)
    values: NDArray[Any] = decode_attention(torch.from_numpy(codes)).numpy()
    return np.where(codes == FILL["uint8"], np.float32(np.nan), values)
