"""Hidden states, decoded."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.errors import MismatchError
from signal_view.extras import xarray
from signal_view.remembered import once_per_cache
from signal_view.segment_rows import own_places, own_rows, row_coordinates, sampled_places, sampled_rows
from signal_view.segment_text import SegmentText
from signal_view.signals.base import Lazy, SignalView

if TYPE_CHECKING:
    from signal_store.codecs.hidden import HiddenCodec


class HiddenView(SignalView):
    """States of each tap and layer."""

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """See the base."""
        held = segment.cache.manifest.calibration.hidden
        return {f"/{h.group}": hidden(segment, h.tap, h.layer).to_dataset(name="state") for h in held}

    def lazy(self, cache: Cache, path: str, shape: tuple[int, ...]) -> dict[str, Lazy]:
        """See the base."""
        for layout in cache.manifest.calibration.hidden:
            if path == f"{layout.group}/values":
                about = {"units": "activation", "long_name": f"{layout.tap} of block {layout.layer}"}
                decode = partial(_states, cache, layout.group)
                return {"state": Lazy(("row", "channel"), (shape[0], layout.width), np.dtype(np.float32), decode, about)}
        return {}


@once_per_cache
def hidden_codecs(cache: Cache) -> "dict[str, HiddenCodec]":
    """By group, those of the hidden states, on the CPU, read once."""
    from signal_store.codecs.cached import hidden_codec

    return {layout.group: hidden_codec(cache, layout) for layout in cache.manifest.calibration.hidden}


def hidden(segment: SegmentText, tap: str, layer: int) -> Any:
    """DataArray [token, channel] float32 of a tap of a layer, at the places that were sampled."""
    import torch

    cache = segment.cache
    layouts = {(h.tap, h.layer): h for h in cache.manifest.calibration.hidden}
    if (tap, layer) not in layouts:
        held = ", ".join(f"{t} of {n}" for t, n in layouts) or "no hidden states"
        raise MismatchError("the cache does not hold this state", expected=held, found=f"{tap} of {layer}", where=cache.uri)
    layout = layouts[tap, layer]
    if "hidden/rows/position" in cache.capacity_rows:
        rows = sampled_rows(segment, "hidden")
        places = sampled_places(segment, "hidden", rows)
    else:
        places = np.arange(own_places(segment).start, len(segment))
        rows = own_rows(segment)
    values, scale = (torch.from_numpy(cache.read(f"{layout.group}/{name}", rows.start, rows.stop)) for name in ("values", "scale"))
    attributes = {
        "units": "activation",
        "long_name": f"{tap} of block {layer}",
        "explained_variance": layout.explained_variance,
        "rank": layout.rank or layout.width,
    }
    return xarray().DataArray(
        hidden_codecs(cache)[layout.group].decode(values, scale).numpy(),
        dims=("token", "channel"),
        coords={"token": places, **row_coordinates(segment, places)},
        name=f"{tap}_{layer}",
        attrs=attributes,
    )


def _states(cache: Cache, group: str, start: int, stop: int) -> NDArray[Any]:
    import torch

    values, scale = (torch.from_numpy(cache.read(f"{group}/{name}", start, stop)) for name in ("values", "scale"))
    decoded: NDArray[Any] = hidden_codecs(cache)[group].decode(values, scale).numpy()
    return decoded  # the scale of an unused row is NaN, and so is the row
