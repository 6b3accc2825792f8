"""Units whose record or shards are damaged, computed anew.

Where a unit comes out the same to the byte, as it does on the kind of machine that made it, its record stands. Elsewhere it gets a
record of the next revision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from run_kit.progress import progress_bar
from signal_store.canonical import digest
from signal_store.io.objects import Objects
from signal_store.ledger.catalogue import unit_entries
from signal_store.ledger.documents import (
    UnitRecord,
    attempt_folder,
    commit,
    find_document,
    newest_revision,
    unit_key,
)
from signal_store.ledger.entries import Entry, Ledger, Origin
from teacher_cache.builder.calibrate import Calibrated
from teacher_cache.builder.fill import compute_unit, publish_shards
from teacher_cache.builder.session import BuildSession


@dataclass(frozen=True, slots=True)
class RemadeUnits:
    """The damaged objects, the units that were computed for them, and of these the ones that came out otherwise."""

    keys: tuple[str, ...]
    computed: tuple[int, ...]
    revised: tuple[int, ...]


def repair_records(session: BuildSession, ledger: Ledger) -> RemadeUnits:
    """Remove records that are damaged, for they say nothing that can be trusted, and compute the units that have none then."""
    records = [entry for entry in unit_entries(ledger) if entry.origin is Origin.RECORD]
    newest = {entry.unit: entry for entry in records}  # revisions ascend
    failed = ledger.failing(records)
    for entry in failed:
        session.objects.delete(entry.key)
        ledger.forget(entry.key)
    return _remade(session, failed, [entry for entry in failed if newest[entry.unit] is entry])


def repair_shards(session: BuildSession, ledger: Ledger) -> RemadeUnits:
    """Compute the units of which a shard is damaged."""
    failed = ledger.failing(entry for entry in unit_entries(ledger) if entry.origin is Origin.SHARD)
    return _remade(session, failed, failed)


def _remade(session: BuildSession, failed: Sequence[Entry], lost: Sequence[Entry]) -> RemadeUnits:
    units = sorted({entry.unit for entry in lost if entry.unit is not None})
    revised = []
    with progress_bar() as progress:
        bar = progress.add_task("repair", total=len(units), unit="units")
        for unit in units:
            if not _remake_unit(session.calibrated, session.objects, unit):
                revised.append(unit)
            progress.advance(bar)
    return RemadeUnits(tuple(entry.key for entry in failed), tuple(units), tuple(revised))


def _remake_unit(calibrated: Calibrated, objects: Objects, unit: int) -> bool:
    """Compute a unit; publish the same bytes under the standing record, or commit the next revision. Whether it came out as it was
    recorded, or had no record any more."""
    revision = newest_revision(objects, unit)
    with attempt_folder(objects, f"{unit:07d}") as (attempt, prefix):
        record = compute_unit(calibrated, objects, unit, revision, prefix)
    standing = find_document(objects, unit_key(unit, revision))
    same = standing is None or digest(standing.body["shards"]) == digest(record.to_body()["shards"])
    if not same:
        record = UnitRecord(record.cache_id, unit, revision + 1, record.shards, record.saturation)
    if standing is None or not same:
        _, mine = commit(objects, unit_key(unit, record.revision), record.to_body(), attempt)
        if not mine:  # another repair was first, and its bytes are the ones that count
            objects.delete_tree(prefix)
            return same
    publish_shards(objects, calibrated.manifest.specs, unit, prefix)
    return same
