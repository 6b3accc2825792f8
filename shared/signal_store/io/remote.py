"""Objects of an S3-compatible bucket, or read-only of a web server, through obstore.

Requests that fail with 5xx, time out or are cut off are retried with backoff, then named. `create` is a conditional put.
"""

import asyncio
import contextlib
import importlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, BinaryIO, Self, cast

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store

from signal_store.errors import InputError, NotFoundError, SignalStoreError, StorageError
from signal_store.io.read_store import ReadStore

TIMEOUT_SECONDS = 60
RETRIES = 8
RETRY_SECONDS = 180


def _obstore() -> Any:
    try:
        return importlib.import_module("obstore")
    except ImportError as error:
        raise InputError(
            "remote stores need obstore", found="it is not installed", remedy='pip install "teacher-cache[remote]"'
        ) from error


class RemoteObjects:
    """Objects below an address. `store` is an obstore store whose paths are our keys."""

    def __init__(self, uri: str, store: Any) -> None:
        self._uri, self.store = uri, store
        self._obstore = _obstore()

    @classmethod
    def at(cls, uri: str) -> Self:
        """The objects at `s3://bucket/prefix` (AWS_* variables apply) or `https://...`."""
        obstore = _obstore()
        backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2}
        options = {
            "retry_config": {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS), "backoff": backoff},
            "client_options": {"timeout": timedelta(seconds=TIMEOUT_SECONDS), "allow_http": True},
        }
        if not uri.partition("://")[2].strip("/"):
            raise InputError("not an address of a cache", expected="s3://bucket/prefix or https://host/path", found=uri)
        with _named(obstore, uri):
            return cls(uri, importlib.import_module("obstore.store").from_url(uri, **options))

    def __repr__(self) -> str:
        return f"RemoteObjects({self._uri!r})"

    @property
    def uri(self) -> str:
        """See `Objects.uri`."""
        return self._uri

    def _where(self, key: str) -> str:
        return f"{self._uri.rstrip('/')}/{key}"

    def read(self, key: str) -> bytes:
        """See `Objects.read`."""
        with _named(self._obstore, self._where(key)):
            for pause in _pauses():
                try:
                    return bytes(self._obstore.get(self.store, key).bytes())
                except self._obstore.exceptions.GenericError:  # obstore tries a request again, not a body that was cut off
                    time.sleep(pause)
            return bytes(self._obstore.get(self.store, key).bytes())

    def exists(self, key: str) -> bool:
        """See `Objects.exists`."""
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        """See `Objects.size`."""
        try:
            with _named(self._obstore, self._where(key)):
                return int(self._obstore.head(self.store, key)["size"])
        except NotFoundError:
            return None

    def create(self, key: str, data: bytes) -> bool:
        """See `Objects.create`: a conditional put."""
        try:
            with _named(self._obstore, self._where(key)):
                self._obstore.put(self.store, key, data, mode="create", use_multipart=False)
        except self._obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """See `Objects.put`."""
        with _named(self._obstore, self._where(key)):
            self._obstore.put(self.store, key, data)

    @contextlib.contextmanager
    def stream(self, key: str) -> Iterator[BinaryIO]:
        """See `Objects.stream`: an upload in parts. One that is broken off leaves no object."""
        with _named(self._obstore, self._where(key)):
            writer = self._obstore.open_writer(self.store, key)
            yield cast(BinaryIO, writer)
            writer.close()

    def publish(self, source: str, target: str) -> None:
        """See `Objects.publish`: a copy inside the store, then a delete."""
        with _named(self._obstore, self._where(target)):
            try:
                self._obstore.copy(self.store, source, target)
            except (FileNotFoundError, self._obstore.exceptions.NotFoundError):
                if not self.exists(target):
                    raise NotFoundError("a staged object is gone", expected=source, where=self._uri) from None
                return
            self._obstore.delete(self.store, source)

    def list(self, prefix: str) -> list[str]:
        """See `Objects.list`."""
        with _named(self._obstore, self._where(prefix)):
            batches = self._obstore.list(self.store, prefix or None)
            return sorted(str(item["path"]) for batch in batches for item in batch)

    def delete(self, key: str) -> None:
        """See `Objects.delete`."""
        with contextlib.suppress(NotFoundError), _named(self._obstore, self._where(key)):
            self._obstore.delete(self.store, key)

    def delete_tree(self, prefix: str) -> None:
        """See `Objects.delete_tree`."""
        keys = self.list(prefix)
        if keys:
            with _named(self._obstore, self._where(prefix)):
                self._obstore.delete(self.store, keys)

    def zarr_store(self) -> Store:
        """See `Objects.zarr_store`."""
        from zarr.storage import ObjectStore

        return RetryingStore(cast(Store, ObjectStore(self.store, read_only=True)), self._uri)


class RetryingStore(ReadStore):
    """A zarr store that asks again for an answer that was cut off, then names the object."""

    def __init__(self, store: Store, uri: str) -> None:
        super().__init__(store)
        self._uri = uri

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As the store's own."""
        obstore = _obstore()
        with _named(obstore, f"{self._uri.rstrip('/')}/{key}"):
            for pause in _pauses():
                try:
                    return await self._inner.get(key, prototype, byte_range)
                except obstore.exceptions.GenericError:
                    await asyncio.sleep(pause)
            return await self._inner.get(key, prototype, byte_range)


def _pauses() -> Iterator[float]:
    """Seconds to wait between attempts at a body that was cut off."""
    yield from (0.1 * 2**attempt for attempt in range(RETRIES // 2))


@contextlib.contextmanager
def _named(obstore: Any, where: str) -> Iterator[None]:
    """Turns what obstore raises into our errors, in one line that names the object."""
    try:
        yield
    except (SignalStoreError, obstore.exceptions.AlreadyExistsError):
        raise
    except (FileNotFoundError, obstore.exceptions.NotFoundError) as error:
        raise NotFoundError("no such object", where=where) from error
    except obstore.exceptions.BaseError as error:
        raise StorageError(
            "the store does not answer as it should",
            found=reason(error),
            where=where,
            remedy="Nothing committed is lost: check address, credentials and network, and run the same command again.",
        ) from error


def reason(error: Exception) -> str:
    """What a chain of Rust errors says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Debug source" not in line]
    return lines[0][:300] if lines else type(error).__name__
