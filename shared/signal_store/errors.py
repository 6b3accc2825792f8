"""Everything that can be wrong with a recipe or a cache, grouped by what a caller does about it.

Policy: one line says what is wrong, what was expected, what was found, where, and what to do. Each error carries a stable
`kind` and is also the builtin a Python programmer would catch.
"""

import errno
from typing import Any


class SignalStoreError(Exception):
    """Base of all errors a user can meet; `str()` is the one line shown on the terminal."""

    kind = "error"

    def __init__(
        self, what: str, *, expected: object = None, found: object = None, where: object = None, remedy: str | None = None
    ) -> None:
        self.what, self.expected, self.found, self.where, self.remedy = what, expected, found, where, remedy
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        """As one process sends it to another: what was found may be no more than its text there."""
        return _again, (type(self), self.what, *map(_sent, (self.expected, self.found, self.where)), self.remedy)

    def __str__(self) -> str:
        parts = [f"[{self.kind}] {self.what}"]
        parts += [f"expected {self.expected}"] if self.expected is not None else []
        parts += [f"found {self.found}"] if self.found is not None else []
        parts += [f"in {self.where}"] if self.where is not None else []
        line = "; ".join(parts) + (f". {self.remedy}" if self.remedy else "")
        return " ".join(line.split())


def _sent(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _again(
    kind: type[SignalStoreError], what: str, expected: object, found: object, where: object, remedy: str | None
) -> SignalStoreError:
    return kind(what, expected=expected, found=found, where=where, remedy=remedy)


class InputError(SignalStoreError, ValueError):
    """The recipe or the data is wrong: correct it."""

    kind = "input"


class NotFoundError(SignalStoreError, FileNotFoundError):
    """A file, folder, object or model is not there."""

    kind = "not-found"


class IncompleteError(SignalStoreError, RuntimeError):
    """The cache is not finished: go on building it."""

    kind = "incomplete"


class MismatchError(SignalStoreError, ValueError):
    """What is there is not what was asked for: another teacher, tokenizer, recipe, signal or temperature."""

    kind = "mismatch"


class CorruptError(SignalStoreError, RuntimeError):
    """Bytes are not the bytes that were committed: repair or restore."""

    kind = "corrupt"


class OutOfMemoryError(SignalStoreError, MemoryError):
    """What was asked for does not fit: lower what is held at once."""

    kind = "memory"


class StorageError(SignalStoreError, OSError):
    """The disk is full or refuses to be written; nothing committed is lost."""

    kind = "storage"


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_NOT_WRITABLE = {errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_FAILS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTDOWN, errno.ENXIO, errno.ENODEV}
_TOO_MANY_OPEN = {errno.EMFILE, errno.ENFILE}
UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
"""What a file system answers to what it was not made for."""


def path_error(error: OSError) -> SignalStoreError | None:
    """The error to raise for a path that no file system takes, or None."""
    if error.errno in {errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR}:
        return InputError("a path cannot be used", found=error.strerror, where=error.filename)
    return None


def storage_error(error: OSError, where: object) -> SignalStoreError | None:
    """The error to raise for a read or a write that failed, or None where the failure is none of the disk's."""
    remedy = "Nothing committed is lost: make room and run the same command again."
    if error.errno == errno.ENOENT:
        return NotFoundError(
            "a file or its folder went away", found=error.strerror, where=where, remedy="Run the same command again."
        )
    if error.errno in _FULL:
        return StorageError("the disk is full", found=error.strerror, where=where, remedy=remedy)
    if error.errno in _FORBIDDEN:
        return StorageError(
            "access is refused",
            found=error.strerror,
            where=where,
            remedy="Check that you may read it, and write it if it is a target.",
        )
    if error.errno in _NOT_WRITABLE:
        return StorageError(
            "the target cannot be written", found=error.strerror, where=where, remedy="Check that it is a folder you may write."
        )
    if error.errno in UNSUPPORTED:
        return StorageError(
            "the file system lacks an operation",
            found=error.strerror,
            where=where,
            remedy="`teacher-cache doctor --folder` says whether a cache can be filled on it.",
        )
    if error.errno in _FAILS:
        return StorageError(
            "the disk, or the server behind it, fails",
            found=error.strerror,
            where=where,
            remedy="Nothing committed is lost: see to the disk or the mount and run the same command again.",
        )
    if error.errno in _TOO_MANY_OPEN:
        return StorageError(
            "too many files are open", found=error.strerror, where=where, remedy="Raise the limit, for instance `ulimit -n 4096`."
        )
    return None


def memory_error(error: Exception) -> SignalStoreError | None:
    """The error to raise for Python's MemoryError, torch.OutOfMemoryError, and what torch raises on a CPU; None for others."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in said:
        return None
    remedy = (
        "For a teacher lower batch_tokens; for a student stream.micro_batch_rows, or set activation_checkpointing: true or "
        "precision: bfloat16. The same command goes on from what is committed."
    )
    return OutOfMemoryError("out of memory", found=said, remedy=remedy)
