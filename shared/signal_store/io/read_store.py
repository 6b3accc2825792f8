"""A read-only zarr store that stands on another, and whose every read goes through its own `get`.

Policy: composed, not derived from zarr's `WrapperStore`. A wrapper hands on whatever it does not override, so a method that a later
zarr adds (3.3: `get_ranges`, `get_sync`) reads past the checks without a word. Here such a method is zarr's own default, which
calls `get`, or it is not there.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store


class ReadStore(Store):
    """Reads `inner` through `get`, which subclasses define; lists what `inner` lists; writes nothing."""

    def __init__(self, inner: Store) -> None:
        super().__init__(read_only=True)
        self._inner = inner

    def with_read_only(self, read_only: bool = False) -> Store:
        """Itself; it is read-only. ValueError where a writable one is wanted."""
        if not read_only:
            raise ValueError("this store is read-only")
        return self

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Each range through `get`, at once."""
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **_limits: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Each range through `get`, at once. zarr's own default would raise its errors as a group."""
        found = await self.get_partial_values(prototype, [(key, wanted) for wanted in byte_ranges])
        yield list(enumerate(found))

    async def exists(self, key: str) -> bool:
        """Whether `inner` holds the object."""
        return await self._inner.exists(key)

    @property
    def supports_writes(self) -> bool:
        """No."""
        return False

    @property
    def supports_deletes(self) -> bool:
        """No."""
        return False

    async def set(self, key: str, value: Buffer) -> None:
        """ValueError: it is read-only."""
        raise ValueError(f"{key}: {len(value)} bytes for a store that is read-only")

    async def delete(self, key: str) -> None:
        """ValueError: it is read-only."""
        raise ValueError(f"{key}: this store is read-only")

    @property
    def supports_listing(self) -> bool:
        """As `inner`."""
        return self._inner.supports_listing

    def list(self) -> AsyncIterator[str]:
        """As `inner`."""
        return self._inner.list()

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """As `inner`."""
        return self._inner.list_prefix(prefix)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """As `inner`."""
        return self._inner.list_dir(prefix)

    def close(self) -> None:
        """Close `inner` too."""
        self._inner.close()
        super().close()
