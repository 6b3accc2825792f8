"""fill: run the teacher over each unit that has no record yet, write its shards to staging, and commit.

Encoding and writing of a batch overlap the next forward pass. Any number of workers may fill: each has its share, and takes over
what others have not finished when its own is done. The first record of a unit stands, another attempt at it is thrown away.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from model_taps.machine import MachineClass
from run_kit.progress import progress_bar
from signal_store.errors import MismatchError
from signal_store.format.arrays import ArraySpec
from signal_store.io.objects import Objects
from signal_store.io.shard_writer import UnitArrayWriter
from signal_store.ledger.catalogue import shard_keys
from signal_store.ledger.documents import (
    Document,
    UnitRecord,
    attempt_folder,
    commit,
    finished_units,
    newest_record,
    staging_prefix,
    unit_key,
)
from teacher_cache.builder.calibrate import Calibrated, batches_of
from teacher_cache.builder.worker_notes import noted
from teacher_cache.signals.batch import extract_batch, plan_rows
from teacher_cache.signals.extracted import Extracted, Rows
from teacher_cache.signals.unit_work import UnitWork
from teacher_cache.worker import Worker

MAX_SATURATION = 1e-3


def fill_units(calibrated: Calibrated, objects: Objects, worker: Worker) -> None:
    """Finish every unit of the plan."""
    units = calibrated.plan.units
    with noted(objects, worker) as note, progress_bar() as progress:
        bar = progress.add_task("fill", total=sum(u["tokens"] for u in units), unit="tokens")

        def on_tokens(count: int) -> None:
            progress.advance(bar, count)
            note.adds(count)

        seen: set[int] = set()
        for unit in _turns(objects, worker, len(units)):
            record = newest_record(objects, unit)
            if record is None:
                note.begins(unit)
                record = fill_unit(calibrated, objects, unit, on_tokens=on_tokens)
                _refuse_another_cache(record, calibrated)
                publish_unit(objects, record, calibrated.manifest.specs)
                note.finished()
            elif unit not in seen:
                _refuse_another_cache(record, calibrated)
                progress.advance(bar, units[unit]["tokens"])
            seen.add(unit)


def _turns(objects: Objects, worker: Worker, num_units: int) -> Iterator[int]:
    """Units in the order this worker looks at them: its own share; then what nobody has claimed; then, last ones first, what others
    have claimed and not finished, for they may be dead. A unit comes up more than once; who looks sees whether it is done."""
    for unit in range(worker.number, num_units, worker.count):
        if worker.count > 1 and not objects.exists(unit_key(unit)):
            worker.claims(objects, f"unit-{unit:07d}")
        yield unit
    if worker.count == 1:
        return
    others = [unit for unit in range(num_units) if unit % worker.count != worker.number]
    done = finished_units(objects)
    for unit in others:
        if unit not in done and worker.claims(objects, f"unit-{unit:07d}"):
            yield unit
    done = finished_units(objects)
    yield from (unit for unit in reversed(others) if unit not in done)


def fill_unit(
    calibrated: Calibrated,
    objects: Objects,
    unit: int,
    on_tokens: Callable[[int], None] = lambda _n: None,
) -> Document:
    """One attempt at one unit; returns the record that stands, this attempt's or an earlier one's."""
    started = time.perf_counter()
    try:
        with attempt_folder(objects, f"{unit:07d}") as (attempt, prefix):
            record = compute_unit(calibrated, objects, unit, 0, prefix, on_tokens)
    except FileNotFoundError:
        standing = newest_record(objects, unit)
        if standing is None:
            raise
        return standing  # another attempt was first, and a seal swept what this one had staged
    # From here on the staged objects may be the committed ones: nothing but a lost race removes them.
    about = {"seconds": time.perf_counter() - started, "machine": MachineClass.of(calibrated.teacher.device).facts()}
    standing, mine = commit(objects, unit_key(unit, 0), record.to_body(), attempt, **about)
    if not mine:
        objects.delete_tree(prefix)
    return standing


def compute_unit(
    calibrated: Calibrated,
    objects: Objects,
    unit: int,
    revision: int,
    prefix: str,
    on_tokens: Callable[[int], None] = lambda _n: None,
) -> UnitRecord:
    """Run the teacher over a unit and write its shards below `prefix`."""
    work = UnitWork(unit, calibrated.plan.unit(objects, unit))
    with UnitWriters(objects, prefix, calibrated.manifest.specs, unit) as writers:
        writers.append(plan_rows(calibrated, work))
        for batch in batches_of(calibrated, work.plan):
            writers.append_later(extract_batch(calibrated, work, batch))
            on_tokens(int(work.plan.length[batch.first : batch.last].sum()))
        return writers.finish(calibrated.manifest.cache_id, unit, revision)


def publish_unit(objects: Objects, record: Document, specs: tuple[ArraySpec, ...]) -> None:
    """Move a committed attempt's shards to their zarr keys. Idempotent, by anyone who sees the record."""
    unit = record.body["unit"]
    publish_shards(objects, specs, unit, staging_prefix(f"{unit:07d}", record.about["attempt"]))


def publish_shards(objects: Objects, specs: Sequence[ArraySpec], unit: int, prefix: str) -> None:
    """The same, of the attempt that staged below `prefix`."""
    for spec in specs:
        for key in shard_keys(spec, unit):
            objects.publish(f"{prefix}/{key}", key)
    objects.delete_tree(prefix)


def _refuse_another_cache(record: Document, calibrated: Calibrated) -> None:
    if record.body["cache_id"] != calibrated.manifest.cache_id:
        raise MismatchError(
            "a unit belongs to another cache",
            expected=calibrated.manifest.cache_id,
            found=record.body["cache_id"],
            where=unit_key(record.body["unit"]),
        )


class UnitWriters:
    """The open arrays of one unit. `append_later` hands rows to one background thread, at most one batch ahead."""

    def __init__(self, objects: Objects, prefix: str, specs: tuple[ArraySpec, ...], unit: int) -> None:
        self._stack = contextlib.ExitStack()
        self._writers = {s.path: self._stack.enter_context(UnitArrayWriter(objects, prefix, s, unit)) for s in specs}
        self._thread = self._stack.enter_context(ThreadPoolExecutor(max_workers=1))
        self._pending: Future[None] | None = None
        self._saturated: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> "UnitWriters":
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def append(self, rows: Rows) -> None:
        """Add rows to their arrays."""
        for path, array in rows.items():
            self._writers[path].append(array)

    def append_later(self, extracted: Extracted) -> None:
        """Hand rows to the background thread; waits for the batch before."""
        for signal, (hit, of) in extracted.saturated.items():
            before = self._saturated.get(signal, (0, 0))
            self._saturated[signal] = (before[0] + hit, before[1] + of)
        self._wait()
        self._pending = self._thread.submit(self.append, extracted.rows)

    def finish(self, cache_id: str, unit: int, revision: int) -> UnitRecord:
        """Close all arrays; MismatchError if too many codes hit their limit."""
        self._wait()
        saturation = {signal: hit / max(1, of) for signal, (hit, of) in self._saturated.items()}
        for signal, share in saturation.items():
            if share > MAX_SATURATION:
                raise MismatchError(
                    f"codes of {signal} hit their limit",
                    expected=f"at most {MAX_SATURATION} of them",
                    found=f"{share:.2g}",
                    where=f"unit {unit}",
                    remedy="Calibrate on more tokens: raise calibration.tokens_per_source, in another folder.",
                )
        return UnitRecord(cache_id, unit, revision, {path: writer.close() for path, writer in self._writers.items()}, saturation)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
