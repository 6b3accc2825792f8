"""Objects as files of a folder, on a local disk or a POSIX file system that several machines share.

A commit needs hard links (a record is created once, and whole), renames, and folders that can be synced (a name is durable). What a
file system cannot do of that is named, and nothing weaker is put in its place.
"""

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

from signal_store.errors import UNSUPPORTED, NotFoundError, StorageError, storage_error

SWEPT_AT_MOST = 8
SCRATCH = "ledger/staging/scratch"
"""Where a cache's unfinished files are, which a seal sweeps."""
NO_LINKS = frozenset({*UNSUPPORTED, errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EINVAL})
NO_SYNC = frozenset({*UNSUPPORTED, errno.EINVAL, errno.EBADF, errno.EISDIR})
NO_RENAME = frozenset({*UNSUPPORTED, errno.EXDEV, errno.EINVAL})
"""What file systems answer to a link, a sync or a rename that they were not made for; a link may also be forbidden (`_link`)."""


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
                self._move_scratch(data, lambda temporary: _link(temporary, target))
            except FileExistsError:
                return False
            _sync_folder(target.parent)
            return True

    def put(self, key: str, data: bytes) -> None:
        """See `Objects.put`."""
        target = self._path(key)
        with _storage_errors(target):
            _make_folder(target.parent)
            self._move_scratch(data, lambda temporary: _rename(temporary, target))
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
                _rename(old, new)
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


def _link(temporary: Path, target: Path) -> None:
    """Give the file its name, unless there is one; a link that is refused where another one works is forbidden, not unknown."""
    with _needs("make hard links", NO_LINKS, target):
        try:
            target.hardlink_to(temporary)
        except PermissionError as error:
            beside = temporary.with_name(f"{temporary.name}.link")
            beside.hardlink_to(temporary)
            beside.unlink()
            raise PermissionError(errno.EACCES, error.strerror, str(target)) from error


def _rename(old: Path, new: Path) -> None:
    with _needs("rename a file", NO_RENAME, new):
        old.replace(new)


def _sync(file: BinaryIO) -> None:
    file.flush()
    with _needs("sync a file", NO_SYNC, Path(file.name)):
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with _needs("sync a folder", NO_SYNC, folder):
        sync(folder)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable; OSError of `NO_SYNC` where the file system cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _needs(what: str, refusals: frozenset[int], where: Path) -> Iterator[None]:
    """StorageError that says what the file system cannot do, where it says so itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in refusals:
            raise
        raise StorageError(
            f"the file system cannot {what}, which a commit needs",
            found=error.strerror,
            where=where,
            remedy="Fill on a local disk, on NFS or Lustre, or in a bucket by its s3:// address, and copy from there.",
        ) from error


@contextlib.contextmanager
def _storage_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        known = storage_error(error, where)
        if known is None:
            raise
        raise known from error
