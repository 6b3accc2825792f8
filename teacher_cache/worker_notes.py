"""What workers say of themselves while they fill: `ledger/workers/<i>-of-<n>.json`, replaced every few seconds,
gone when the cache is sealed.

Policy: for people only. Nothing waits for a note, nothing is decided by one, and one that is lost is written again.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from signal_store.errors import NotFoundError, SignalStoreError
from signal_store.objects import Objects
from teacher_cache.workers import Worker

NOTES = "ledger/workers"
EVERY_SECONDS = 5.0


State = Literal["calibrates", "fills", "done", "failed"]


@dataclass(frozen=True, slots=True)
class WorkerNote:
    """`started` and `updated` in seconds since 1970 by the worker's own clock; `units` and `tokens` done since then; `unit` the one
    in work; `error` the last line of what stopped it."""

    worker: str
    host: str
    pid: int
    state: State
    started: float
    updated: float
    unit: int | None = None
    units: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean since it started; None before it has done anything."""
        seconds = self.updated - self.started
        return self.tokens / seconds if self.tokens and seconds > 0 else None


class NoteBook:
    """A worker's own note."""

    def __init__(self, objects: Objects, worker: Worker, state: State) -> None:
        now = time.time()
        self._objects, self._key = objects, f"{NOTES}/{worker.number}-of-{worker.count}.json"
        self.note = WorkerNote(str(worker), socket.gethostname(), os.getpid(), state, now, now)
        self._write(self.note)

    def begins(self, unit: int) -> None:
        """A unit."""
        self._write(replace(self.note, unit=unit))

    def adds(self, tokens: int) -> None:
        """Tokens that the teacher has read; written down every few seconds."""
        self.note = replace(self.note, tokens=self.note.tokens + tokens)
        if time.time() - self._written > EVERY_SECONDS:
            self._write(self.note)

    def finished(self) -> None:
        """The unit."""
        self._write(replace(self.note, unit=None, units=self.note.units + 1))

    def ends(self, state: State, error: str | None = None) -> None:
        """All of it."""
        self._write(replace(self.note, state=state, error=error))

    def _write(self, note: WorkerNote) -> None:
        self._written = time.time()
        self.note = replace(note, updated=self._written)
        with contextlib.suppress(SignalStoreError, OSError):  # the work goes on, and the next note may be written
            self._objects.put(self._key, json.dumps(asdict(self.note)).encode())


@contextlib.contextmanager
def noted(objects: Objects, worker: Worker, state: State = "fills") -> Iterator[NoteBook]:
    """A note for as long as the block runs; how it ended stays."""
    book = NoteBook(objects, worker, state)
    try:
        yield book
    except BaseException as error:
        book.ends("failed", " ".join(f"{type(error).__name__}: {error}".split())[:500])
        raise
    book.ends("done")


def read_notes(objects: Objects) -> tuple[WorkerNote, ...]:
    """Of all workers; one that is being replaced or is not whole is passed over until the next look."""
    found = []
    for key in objects.list(NOTES):
        try:
            found.append(WorkerNote(**json.loads(objects.read(key))))
        except (NotFoundError, ValueError, TypeError):
            continue
    return tuple(sorted(found, key=lambda note: tuple(map(int, note.worker.split("/")))[::-1]))
