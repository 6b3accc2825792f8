"""The on-disk contract of teacher-cache: recipe of signals, manifest, arrays, open, commit, errors.

import signal_store
cache = signal_store.open_cache("cache.zarr")
"""

from signal_store.cache import Cache, open_cache
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
