"""Paths of sampled tokens up the gradient of their own loss."""

from typing import Any

import numpy as np

from signal_view.extras import xarray
from signal_view.segment_rows import row_coordinates, sampled_places, sampled_rows
from signal_view.segment_text import SegmentText
from signal_view.signals.base import SignalView, about


class ReplayView(SignalView):
    """The paths; gradients at layers are shown of a whole cache only, as they are stored."""

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """See the base."""
        return {"/replay": replay(segment)}


def replay(segment: SegmentText) -> Any:
    """Dataset of the replayed paths: `moved` [token, step, channel] from the final hidden state up its loss's gradient, `nll`
    [token, state] the loss along it, in nats."""
    cache = segment.cache
    rows = sampled_rows(segment, "replay")
    places = sampled_places(segment, "replay", rows)
    values, scale, nll = (cache.read(f"replay/path/{name}", rows.start, rows.stop) for name in ("values", "scale", "nll"))
    moved = values.astype(np.float32) * scale[:, None, None]
    return xarray().Dataset(
        {
            "moved": (("token", "step", "channel"), moved, {"units": "activation", "long_name": "from the path's beginning"}),
            "nll": (("token", "state"), nll.astype(np.float32), about("replay/path/nll")),
        },
        coords={"token": places, **row_coordinates(segment, places)},
    )
