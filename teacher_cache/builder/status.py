"""How far a cache is, before and after it is sealed.

From the plan, the list of records, and the workers' notes; no unit's record is opened.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from signal_store.errors import NotFoundError, StorageError
from signal_store.io.objects import Objects
from signal_store.ledger.documents import (
    CALIBRATION,
    PLAN,
    extension_key,
    find_document,
    finished_units,
    newest_generation,
    read_document,
    seal_key,
)
from teacher_cache.builder.worker_notes import WorkerNote, read_notes

SILENT_SECONDS = 120.0
"""A worker that has said nothing for so long is not counted as one that works."""

COLUMNS = ("worker", "host", "state", "unit", "units done", "tokens/s", "last word", "error")
Stage = Literal["planned", "filling", "filled", "sealed"]


@dataclass(frozen=True, slots=True)
class Status:
    """`done` of each unit in order, `unit_tokens` of each; `generation` of the newest seal; `tokens_per_second` of the workers that
    work now, together, and `seconds_left` at that rate, None where nobody works."""

    uri: str
    stage: Stage
    generation: int | None
    done: tuple[bool, ...]
    unit_tokens: tuple[int, ...]
    workers: tuple[WorkerNote, ...]
    now: float

    @property
    def done_units(self) -> int:
        """Units that have a record."""
        return sum(self.done)

    @property
    def done_tokens(self) -> int:
        """Their tokens."""
        return sum(tokens for done, tokens in zip(self.done, self.unit_tokens, strict=True) if done)

    @property
    def working(self) -> tuple[WorkerNote, ...]:
        """Workers that fill, and have said so lately."""
        return tuple(
            note for note in self.workers if note.state in {"calibrates", "fills"} and self.now - note.updated < SILENT_SECONDS
        )

    @property
    def tokens_per_second(self) -> float | None:
        """Of all that work."""
        rates = [rate for note in self.working if (rate := note.tokens_per_second) is not None]
        return sum(rates) if rates else None

    @property
    def seconds_left(self) -> float | None:
        """Until all units have a record."""
        rate = self.tokens_per_second
        return None if rate is None else (sum(self.unit_tokens) - self.done_tokens) / rate

    @property
    def last_error(self) -> WorkerNote | None:
        """Of the worker that failed last."""
        failed = [note for note in self.workers if note.error is not None]
        return max(failed, key=lambda note: note.updated, default=None)


def read_status(objects: Objects) -> Status:
    """How far the cache at a place is. NotFoundError where no plan is; StorageError where the place cannot be listed."""
    plan = find_document(objects, PLAN)
    if plan is None:
        remedy = "If a build has just begun, its plan is not written yet."
        raise NotFoundError("no plan of a cache here", expected="teacher-cache plan or build", where=objects.uri, remedy=remedy)
    units = list(plan.body["units"])
    number = 1
    while (extension := find_document(objects, extension_key(number))) is not None:
        units += extension.body["units"]
        number += 1
    finished = finished_units(objects)
    done = tuple(unit in finished for unit in range(len(units)))
    generation = newest_generation(objects)
    sealed_units = 0 if generation is None else int(read_document(objects, seal_key(generation)).body["num_units"])
    calibrated = bool(finished) or objects.exists(CALIBRATION)
    stage: Stage = "filled" if all(done) else "filling" if calibrated else "planned"
    stage = "sealed" if all(done) and sealed_units == len(units) else stage
    tokens = tuple(int(unit["tokens"]) for unit in units)
    return Status(objects.uri, stage, generation, done, tokens, read_notes(objects), time.time())


def find_status(objects: Objects) -> Status | None:
    """The same, or None where it cannot be told: no plan, or a place that cannot be listed."""
    try:
        return read_status(objects)
    except (NotFoundError, StorageError):
        return None


def line_of(found: Status) -> str:
    """All in one line."""
    share = found.done_tokens / max(1, sum(found.unit_tokens))
    parts = [f"{found.stage}: {found.done_units:,} of {len(found.done):,} units, {found.done_tokens:,} tokens, {share:.0%}"]
    if found.generation is not None:
        parts.append(f"generation {found.generation}")
    if found.stage != "sealed" and found.tokens_per_second is not None:
        parts += [f"{found.tokens_per_second:,.0f} tokens/s", f"{duration(found.seconds_left or 0)} left"]
    if found.stage == "filled":
        parts.append("run teacher-cache seal (or build)")
    return "  ".join(parts)


def worker_rows(found: Status) -> Sequence[tuple[str, ...]]:
    """Of each worker: name, host, state, unit, units, rate, seconds since its last word, error."""
    rows = []
    for note in found.workers:
        silent = note.state in {"calibrates", "fills"} and note not in found.working
        rate = note.tokens_per_second
        rows.append(
            (
                note.worker,
                f"{note.host} ({note.pid})",
                "silent" if silent else note.state,
                "" if note.unit is None else str(note.unit),
                f"{note.units:,}",
                "" if rate is None else f"{rate:,.0f}",
                f"{duration(max(0.0, found.now - note.updated))} ago",
                note.error or "",
            )
        )
    return rows


def duration(seconds: float) -> str:
    """3 s, 4 min, 2.5 h, 1.2 days."""
    for size, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"
