"""The thin layer between the format and a place that holds bytes under keys: a folder, an S3-compatible bucket, or a web server.

Policy: what `create` and `put` return from is durable (on a disk, file and folder are synced) and whole (a key never shows half
an object). `create` tells who won. A key is a relative path with `/`. Stock zarr stores do neither, hence this layer.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import BinaryIO, Protocol

from zarr.abc.store import Store

from signal_store.errors import InputError


class Objects(Protocol):
    """What the format needs from storage."""

    @property
    def uri(self) -> str:
        """Where the objects are, as a user writes it."""

    def read(self, key: str) -> bytes:
        """The whole object; NotFoundError if there is none."""

    def exists(self, key: str) -> bool:
        """Whether the key holds an object."""

    def size(self, key: str) -> int | None:
        """Length of the object in bytes; None if there is none."""

    def create(self, key: str, data: bytes) -> bool:
        """Put the object unless the key holds one; True if this call did."""

    def put(self, key: str, data: bytes) -> None:
        """Put or replace the object, in one step."""

    def stream(self, key: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to write an object piece by piece; durable when the block ends. The key must not be read before that."""

    def publish(self, source: str, target: str) -> None:
        """Move an object to its final key. Idempotent: whoever comes second finds it done."""

    def list(self, prefix: str) -> list[str]:
        """All keys below a folder, sorted; StorageError where the place cannot list (a plain web server)."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def delete_tree(self, prefix: str) -> None:
        """Remove everything below a folder, if it is there."""

    def zarr_store(self) -> Store:
        """The same objects as a read-only zarr store."""


def objects_at(uri: str | Path) -> Objects:
    """The objects at a path, an `s3://bucket/prefix` (credentials and endpoint as AWS_* variables say), or, read-only, an
    `https://` address."""
    text = str(uri)
    if not text.strip() or "\0" in text:
        raise InputError("not an address of a cache", expected="a folder, s3://bucket/prefix or https://…", found=repr(text))
    if text.startswith(("s3://", "http://", "https://")):
        from signal_store.io.remote import RemoteObjects  # obstore is an extra

        return RemoteObjects.at(text)
    from signal_store.io.local import LocalObjects

    path = text.removeprefix("file://")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path) or (path != text and not path.startswith("/")):
        raise InputError("an address of an unknown kind", expected="a folder, file:///…, s3://… or https://…", found=text)
    path = os.path.expanduser(path)  # noqa: PTH111  (Path's own raises where there is no such user)
    return LocalObjects(Path(path).absolute())  # a process may change its folder


def join_uri(uri: str | Path, key: str) -> str:
    """The address of an object."""
    return f"{str(uri).rstrip('/')}/{key}"
