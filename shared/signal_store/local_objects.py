"""Objects as files of a folder, on a local disk or a POSIX file system that several machines share."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from zarr.abc.store import Store
from zarr.storage import LocalStore

from signal_store.errors import NotFoundError, storage_error

SWEPT_AT_MOST = 8
SCRATCH = "ledger/staging/scratch"
"""Where a cache's unfinished files are, which a seal sweeps."""


class LocalObjects:
    """Objects as files below `root`; unfinished ones are in `scratch`, on the same file system."""

    def __init__(self, root: Path | str, scratch: str = SCRATCH) -> None:
        self.root, self._scratch = Path(root), scratch

    @property
    def uri(self) -> str:
        """See `Objects.uri`."""
        return str(self.root)

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

    def size(self, key: str) -> int | None:
        """See `Objects.size`."""
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def create(self, key: str, data: bytes) -> bool:
        """See `Objects.create`: a synced temporary file is hard-linked to the key, which fails if the key exists."""
        target = self._path(key)
        with _storage_errors(target):
            _make_folder(target.parent)
            try:
                self._move_scratch(data, target.hardlink_to)
            except FileExistsError:
                return False
            _sync_folder(target.parent)
            return True

    def put(self, key: str, data: bytes) -> None:
        """See `Objects.put`."""
        target = self._path(key)
        with _storage_errors(target):
            _make_folder(target.parent)
            self._move_scratch(data, lambda temporary: temporary.replace(target))
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

    def delete(self, key: str) -> None:
        """See `Objects.delete`."""
        with _storage_errors(self._path(key)):
            self._path(key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        """See `Objects.delete_tree`."""
        try:
            shutil.rmtree(self._path(prefix))
        except OSError as error:  # gone, or another process is at work in it
            if error.errno not in {errno.ENOENT, errno.ENOTEMPTY}:
                raise

    def zarr_store(self) -> Store:
        """See `Objects.zarr_store`."""
        return LocalStore(self.root, read_only=True)

    def _move_scratch(self, data: bytes, move: Callable[[Path], object]) -> None:
        """Write a scratch file and give it its name; once more where a seal has swept it away in between."""
        for attempt in range(SWEPT_AT_MOST):
            temporary = None
            try:
                temporary = self._write_scratch(data)
                move(temporary)
                return
            except FileNotFoundError:
                if attempt == SWEPT_AT_MOST - 1:
                    raise
            finally:
                if temporary is not None:
                    temporary.unlink(missing_ok=True)

    def _write_scratch(self, data: bytes) -> Path:
        """A synced file with `data`, under a name of its own where a seal sweeps what kills left."""
        folder = self.root / self._scratch
        _make_folder(folder)
        path = folder / f".{uuid.uuid4().hex}"
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
