"""A read-through copy, on the local disk, of what a remote store gave: least recently used leaves first, at a size limit.

Sits below the checks, so a copy that the disk spoiled is found, dropped, and fetched again.
"""

import importlib
from pathlib import Path
from typing import Any

from pydantic import Field
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store

from signal_store.errors import InputError
from signal_store.format.section import Section
from signal_store.io.read_store import ReadStore


class DiskCacheOptions(Section):
    """Where copies are kept, and how many bytes of them."""

    folder: str
    max_bytes: int = Field(16 * 2**30, ge=2**20)


class DiskCachedStore(ReadStore):
    """Keeps each answer of `store` under its key and byte range; safe for several processes on one folder."""

    def __init__(self, store: Store, options: DiskCacheOptions, name: str) -> None:
        super().__init__(store)
        self._options, self._name = options, name
        try:
            diskcache: Any = importlib.import_module("diskcache")
        except ImportError as error:
            remedy = 'pip install "teacher-cache[remote]"'
            raise InputError(
                "a local copy of a remote cache needs diskcache", found="it is not installed", remedy=remedy
            ) from error
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        self._copies = diskcache.Cache(
            options.folder, size_limit=options.max_bytes, eviction_policy="least-recently-used", cull_limit=64
        )

    def _place(self, key: str, byte_range: ByteRequest | None) -> str:
        return f"{self._name}\n{key}\n{byte_range}"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """From the copy, or from the store, which is then copied."""
        place = self._place(key, byte_range)
        kept = self._copies.get(place)
        if isinstance(kept, bytes):
            return prototype.buffer.from_bytes(kept)
        buffer = await self._inner.get(key, prototype, byte_range)
        if buffer is not None:
            self._copies.set(place, buffer.to_bytes(), tag=f"{self._name}\n{key}")
        return buffer

    def forget(self, key: str) -> bool:
        """Drop what was copied of an object; whether there was any."""
        return bool(self._copies.evict(f"{self._name}\n{key}"))
