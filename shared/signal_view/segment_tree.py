"""What a cache holds of a segment as an xarray DataTree: names, units, decoded values."""

from typing import Any

import numpy as np

from signal_view.extras import xarray
from signal_view.segment_text import SegmentText
from signal_view.signals import views_of


def to_xarray(segment: SegmentText) -> Any:
    """DataTree of what the cache holds of a segment, decoded: its tokens, and a group for each signal. Not in it: the dense
    distribution (`logprobs`, `top`), drawn ids, gradients."""
    xr = xarray()
    tokens = xr.Dataset(
        {
            "input_ids": ("token", segment.input_ids, {"units": "id", "long_name": "token id"}),
            "loss_mask": ("token", segment.loss_mask, {"units": "flag", "long_name": "0 nowhere, 1 counts, 2 distribution only"}),
            "piece": ("token", np.asarray(segment.tokens, dtype=object), {"units": "text", "long_name": "text of the token"}),
        },
        coords={"token": np.arange(len(segment))},
        attrs={"source": segment.source, "split": segment.split, "document": segment.document, "segment": segment.index},
    )
    parts: dict[str, Any] = {"/": xr.Dataset(attrs=tokens.attrs), "/tokens": tokens}
    for view in views_of(segment.cache):
        parts |= view.parts(segment)
    return xr.DataTree.from_dict(parts, name=f"segment {segment.index}")
