"""The thin layer between the format and a place that holds bytes under keys: here, a folder on a local disk.

Policy: what `create` and `put` return from is durable (file and folder are synced) and whole (a key never shows half an
object). `create` tells who won. A key is a relative path with `/`. Stock zarr stores do neither, hence this layer.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from signal_store.errors import NotFoundError, storage_error


class Objects(Protocol):
    """What the format needs from storage."""

    def read(self, key: str) -> bytes:
        """The whole object; NotFoundError if there is none."""

    def exists(self, key: str) -> bool:
        """Whether the key holds an object."""

    def create(self, key: str, data: bytes) -> bool:
        """Put the object unless the key holds one; True if this call did."""

    def put(self, key: str, data: bytes) -> None:
        """Put or replace the object, in one step."""

    def stream(self, key: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to write an object piece by piece; durable when the block ends. The key must not be read before that."""

    def publish(self, source: str, target: str) -> None:
        """Move an object to its final key. Idempotent: whoever comes second finds it done."""

    def list(self, prefix: str) -> list[str]:
        """All keys below a folder, sorted."""

    def delete_tree(self, prefix: str) -> None:
        """Remove everything below a folder, if it is there."""


class LocalObjects:
    """Objects as files below `root`."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def __repr__(self) -> str:
        return f"LocalObjects({str(self.root)!r})"

    def _path(self, key: str) -> Path:
        return self.root / key

    def read(self, key: str) -> bytes:
        """See `Objects.read`."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFoundError("no such object", expected=key, where=self.root) from error

    def exists(self, key: str) -> bool:
        """See `Objects.exists`."""
        return self._path(key).is_file()

    def create(self, key: str, data: bytes) -> bool:
        """See `Objects.create`: a synced temporary file is hard-linked to the key, which fails if the key exists."""
        target = self._path(key)
        with _storage_errors(target):
            temporary = _write_beside(target, data)
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                return False
            finally:
                temporary.unlink()
                _sync_folder(target.parent)
            return True

    def put(self, key: str, data: bytes) -> None:
        """See `Objects.put`."""
        target = self._path(key)
        with _storage_errors(target):
            _write_beside(target, data).replace(target)
            _sync_folder(target.parent)

    @contextlib.contextmanager
    def stream(self, key: str) -> Iterator[BinaryIO]:
        """See `Objects.stream`."""
        path = self._path(key)
        with _storage_errors(path):
            _make_folder(path.parent)
            with path.open("wb") as file:
                yield file
                _sync(file)
            _sync_folder(path.parent)

    def publish(self, source: str, target: str) -> None:
        """See `Objects.publish`."""
        old, new = self._path(source), self._path(target)
        with _storage_errors(new):
            _make_folder(new.parent)
            try:
                old.replace(new)
            except FileNotFoundError:
                if not new.is_file():
                    raise NotFoundError("a staged object is gone", expected=source, where=self.root) from None
                return
            _sync_folder(new.parent)

    def list(self, prefix: str) -> list[str]:
        """See `Objects.list`."""
        top = self._path(prefix)
        return sorted(path.relative_to(self.root).as_posix() for path in top.rglob("*") if path.is_file())

    def delete_tree(self, prefix: str) -> None:
        """See `Objects.delete_tree`."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._path(prefix))


def _write_beside(target: Path, data: bytes) -> Path:
    """A synced file with `data` beside `target`, under a name of its own."""
    _make_folder(target.parent)
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with path.open("wb") as file:
            file.write(data)
            _sync(file)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably: each parent is synced after it got a new entry."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in reversed(missing):
        _sync_folder(parent.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        known = storage_error(error, where)
        if known is None:
            raise
        raise known from error
