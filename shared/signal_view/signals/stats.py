"""Statistics of each segment."""

from typing import Any

import numpy as np

from signal_store.signals.stats import ATTENTION_STATISTICS, FFN_STATISTICS
from signal_view.extras import xarray
from signal_view.segment_text import SegmentText
from signal_view.signals.base import SignalView, about


class StatsView(SignalView):
    """By layer, with their names."""

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """See the base."""
        return {f"/stats/{name}": array.to_dataset(name="value") for name, array in statistics(segment).items()}


def statistics(segment: SegmentText) -> dict[str, Any]:
    """By name, DataArrays of the segment's statistics: attention by layer, FFN and gradient by layer."""
    cache, layout, xr = segment.cache, segment.cache.manifest.calibration.stats, xarray()
    found: dict[str, Any] = {}
    if layout is None:
        return found
    for layer in layout.attention_layers:
        path = f"stats/attention/{layer}/values"
        if path in cache.capacity_rows:
            values = segment.row_of(path).astype(np.float32)
            coords = {"head": np.arange(layout.num_heads), "statistic": list(ATTENTION_STATISTICS)}
            found[f"attention_statistics_{layer}"] = xr.DataArray(
                values, dims=("head", "statistic"), coords=coords, attrs=about(path)
            )
    if "stats/ffn/values" in cache.capacity_rows:
        coords = {"layer": list(layout.layers), "statistic": list(FFN_STATISTICS)}
        values = segment.row_of("stats/ffn/values").astype(np.float32)
        found["ffn_statistics"] = xr.DataArray(values, dims=("layer", "statistic"), coords=coords, attrs=about("stats/ffn/values"))
    if "stats/gradient/log10_variance" in cache.capacity_rows:
        values = segment.row_of("stats/gradient/log10_variance").astype(np.float32)
        attributes = {"units": "log10", "long_name": "log10 of the variance of the loss's gradient"}
        found["gradient_log10_variance"] = xr.DataArray(
            values, dims=("layer",), coords={"layer": list(layout.layers)}, attrs=attributes
        )
    return found
