"""The one file that knows zarr's event loop, which zarr does not promise.

Coroutines of a store run there and nowhere else: what zarr itself reads runs there too. So one thread only touches what a store
keeps in memory, and the client of a remote store stays with the loop that it began in.
"""

from collections.abc import Coroutine
from typing import Any, TypeVar

from zarr.core.sync import sync

Value = TypeVar("Value")


def run_on_zarrs_loop(coroutine: Coroutine[Any, Any, Value]) -> Value:
    """The coroutine's value; safe from any thread but the loop's own, and where another loop runs, as in a notebook."""
    return sync(coroutine)
