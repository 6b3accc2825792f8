"""What people see of a cache: decoded arrays with names and units, text with token boundaries, summaries, plots, pages.

import signal_view
cache = signal_view.open_cache("cache.zarr")
cache[0].top()

Nothing here writes to a cache, and nothing is imported before it is asked for: pandas, xarray and matplotlib are the extra
`inspect`.
"""

from signal_view.views import CacheView, SegmentView, open_cache

__all__ = ["CacheView", "SegmentView", "open_cache"]
