"""What workers say of themselves while they fill: `ledger/workers/<i>-of-<n>.json`, replaced every few seconds,
gone when the cache is sealed.

Policy: for people only. Nothing waits for a note, nothing is decided by one, and one that is lost is written again.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from signal_store.errors import NotFoundError, SignalStoreError
from signal_store.format.section import Section
from signal_store.io.objects import Objects
from signal_store.ledger.documents import WORKERS
from teacher_cache.worker import Worker

EVERY_SECONDS = 5.0


Count = Annotated[int, Field(ge=0, lt=2**53)]
State = Literal["calibrates", "fills", "done", "failed"]


class WorkerNote(Section):
    """`started` and `updated` in seconds since 1970 by the worker's own clock; `units` and `tokens` done since then; `unit` the one
    in work; `error` the last line of what stopped it."""

    worker: str = Field(pattern=r"^[0-9]{1,9}/[0-9]{1,9}$")
    host: str
    pid: Count
    state: State
    started: float = Field(ge=0)
    updated: float = Field(ge=0)
    unit: Count | None = None
    units: Count = 0
    tokens: Count = 0
    error: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean since it started; None before it has done anything."""
        seconds = self.updated - self.started
        return self.tokens / seconds if self.tokens and seconds > 0 else None


class Heartbeat:
    """A worker's own note."""

    def __init__(self, objects: Objects, worker: Worker, state: State) -> None:
        now = time.time()
        self._objects, self._key = objects, f"{WORKERS}/{worker.number}-of-{worker.count}.json"
        self.note = WorkerNote(
            worker=str(worker), host=socket.gethostname(), pid=os.getpid(), state=state, started=now, updated=now
        )
        self._write(self.note)

    def begins(self, unit: int) -> None:
        """A unit."""
        self._write(_changed(self.note, unit=unit))

    def adds(self, tokens: int) -> None:
        """Tokens that the teacher has read; written down every few seconds."""
        self.note = _changed(self.note, tokens=self.note.tokens + tokens)
        if time.time() - self._written > EVERY_SECONDS:
            self._write(self.note)

    def finished(self) -> None:
        """The unit."""
        self._write(_changed(self.note, unit=None, units=self.note.units + 1))

    def ends(self, state: State, error: str | None = None) -> None:
        """All of it."""
        self._write(_changed(self.note, state=state, error=error))

    def _write(self, note: WorkerNote) -> None:
        self._written = time.time()
        self.note = _changed(note, updated=self._written)
        with contextlib.suppress(SignalStoreError, OSError):  # the work goes on, and the next note may be written
            self._objects.put(self._key, self.note.model_dump_json().encode())


@contextlib.contextmanager
def noted(objects: Objects, worker: Worker, state: State = "fills") -> Iterator[Heartbeat]:
    """A note for as long as the block runs; how it ended stays."""
    heartbeat = Heartbeat(objects, worker, state)
    try:
        yield heartbeat
    except BaseException as error:
        heartbeat.ends("failed", _said(error))
        raise
    heartbeat.ends("done")


def _said(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:500]


def _changed(note: WorkerNote, **values: Any) -> WorkerNote:
    return note.model_copy(update=values)


def read_notes(objects: Objects) -> tuple[WorkerNote, ...]:
    """Of all workers; one that is being replaced or is not whole is passed over until the next look."""
    found = []
    for key in objects.list(WORKERS):
        try:
            found.append(WorkerNote.model_validate_json(objects.read(key)))
        except (NotFoundError, ValueError):
            continue
    return tuple(sorted(found, key=lambda note: tuple(map(int, note.worker.split("/")))[::-1]))
