"""The on-disk contract of teacher-cache: recipe of signals, manifest, arrays, open, commit, errors.

import signal_store
cache = signal_store.open_cache("cache.zarr")
"""

from typing import TYPE_CHECKING, Any

from signal_store.errors import (
    CorruptError,
    IncompleteError,
    InputError,
    MismatchError,
    NotFoundError,
    OutOfMemoryError,
    SignalStoreError,
    StorageError,
)

if TYPE_CHECKING:
    from signal_store.cache import Cache, open_cache
    from signal_store.io.disk_cache import DiskCacheOptions
    from signal_store.segment import Segment

__all__ = [
    "Cache",
    "CorruptError",
    "DiskCacheOptions",
    "IncompleteError",
    "InputError",
    "MismatchError",
    "NotFoundError",
    "OutOfMemoryError",
    "Segment",
    "SignalStoreError",
    "StorageError",
    "open_cache",
]

_LIES_IN = {
    "Cache": "signal_store.cache",
    "DiskCacheOptions": "signal_store.io.disk_cache",
    "Segment": "signal_store.segment",
    "open_cache": "signal_store.cache",
}


def __getattr__(name: str) -> Any:  # these import zarr; who wants an error's class, or a command's help, does not wait for it
    if name in _LIES_IN:
        import importlib

        return getattr(importlib.import_module(_LIES_IN[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
