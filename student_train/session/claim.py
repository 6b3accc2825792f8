"""A living process's claim on a folder that it writes: a run's, a sweep's. Another process is refused, by name.

The claim is an operating-system lock (flock) on the file `claim.json`, whose text only says who holds it. The system drops it when
the process ends, however it ends: the folder of a killed or requeued job is free at once, and no clock decides anything. Processes
that this one forks (workers of a data loader) do not keep it. Where a file system has no locks, nothing is claimed; that is said.

A folder that holds what is nobody's run is not claimed at all: what a run writes would be read there as a source's text.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
import weakref
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Self

from signal_store.errors import InputError

NAME = "claim.json"
BESIDE = (NAME, ".*", "*.yaml", "*.yml", "*.log", "*.out", "*.err")
"""What may lie in a folder before a run begins there: its recipe, what was said of it, hidden files."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_held: "weakref.WeakSet[Claim]" = weakref.WeakSet()


class Claim:
    """On `folder`, from `take` to the end of the `with` block; `what` is done there, in words. Taking it twice is one claim."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self._descriptor: int | None = None

    def take(self) -> None:
        """Make the folder where it is missing, and claim it; InputError naming the process that holds it."""
        if self._descriptor is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _text(descriptor)
            os.close(descriptor)
            if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
                raise self._refusal(holder) from None
            if error.errno not in _NO_LOCKS:
                raise
            line = f"{self.folder}: the file system has no locks ({error.strerror}): see to it that one process writes there"
            print(line, file=sys.stderr)  # noqa: T201  (a person should know that nothing guards the folder)
            return
        self._descriptor = descriptor
        _held.add(self)
        about = {"pid": os.getpid(), "host": platform.node(), "job": os.environ.get("SLURM_JOB_ID"), "command": sys.argv}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)

    def _refusal(self, holder: str) -> InputError:
        try:
            about = json.loads(holder)
            job = f", job {about['job']}" if about.get("job") else ""
            found = f"process {about['pid']} on {about['host']}{job}"
        except (ValueError, KeyError, TypeError):
            found = "a process that has not said its name yet"
        return InputError(
            f"another process {self.what} in this folder",
            expected="one at a time",
            found=found,
            where=self.folder,
            remedy="Wait for it, end it, or give another out.",
        )

    def release(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def refuse_strangers(folder: Path, own: Collection[str] = ()) -> None:
    """InputError where a folder, in which nothing of ours has begun, holds more than `BESIDE` and `own` names."""
    if not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir())
    if strangers := [name for name in names if name not in own and not any(fnmatchcase(name, pattern) for pattern in BESIDE)]:
        raise InputError(
            "the folder holds something else",
            expected="an empty or new one, or a run's",
            found=", ".join(strangers[:5]),
            where=folder,
            remedy="Give an out of its own.",
        )


def _text(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        return os.pread(descriptor, 4096, 0).decode(errors="replace")
    return ""


def _forget_in_child() -> None:
    """A forked process shares the open file, and so the lock: it closes its copy."""
    for claim in list(_held):
        claim.release()


os.register_at_fork(after_in_child=_forget_in_child)
