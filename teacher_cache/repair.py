"""repair: make a damaged cache whole again. What no unit owns follows from recipe and records; damaged units are computed anew.

Where a unit comes out the same to the byte, as it does on the kind of machine that made it, its record stands. Elsewhere it gets
a record of the next revision, and the cache a new generation: an older one that was opened keeps what it had of whole units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from signal_store.cache import newest_generation
from signal_store.canonical import digest
from signal_store.errors import CorruptError, SignalStoreError
from signal_store.ledger import (
    CALIBRATION,
    MANIFEST,
    PLAN,
    STAGING,
    UNITS,
    Document,
    UnitRecord,
    commit,
    find_document,
    new_attempt,
    read_document,
    seal_key,
    staging_prefix,
    unit_key,
    unit_key_of,
)
from signal_store.objects import Objects, objects_at
from signal_store.progress import progress_bar
from signal_store.seal_record import Seal
from teacher_cache.calibrate import Calibrated, calibrate, restore_calibration_copies
from teacher_cache.fill import compute_unit
from teacher_cache.plan_restore import restore_plan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.seal import newest_records, seal, write_generation
from teacher_cache.verify import Damage, verify


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was mended: objects restored to the same bytes, units that got a new revision, strangers removed."""

    restored: tuple[str, ...]
    revised_units: tuple[int, ...]
    removed: tuple[str, ...]


def repair(recipe: CacheRecipe) -> Repaired:
    """Mend the cache of a recipe; CorruptError if something is left that cannot be."""
    objects = objects_at(recipe.cache)
    broken = _broken_documents(objects)
    for key in broken:
        objects.delete(key)
    if PLAN in broken or any(key.startswith("ledger/extensions/") for key in broken):
        restore_plan(recipe, objects)
    if CALIBRATION in broken or MANIFEST in broken:
        calibrate(recipe)
    if newest_generation(objects) is None:
        # The seal itself is gone: sealing again needs every record, which verify looks at next.
        calibrated = calibrate(recipe)
        _mend_units(calibrated, objects, _units_without_record(objects, calibrated.plan.num_units))
        seal(recipe.cache)
    damages = verify(recipe.cache).damages
    removed = [d.key for d in damages if d.what == "does not belong to the cache"]
    for key in removed:
        objects.delete(key)
    restored = [*broken, *(d.key for d in damages if d.key not in removed)]
    revised = _mend(recipe, objects, [d for d in damages if d.key not in removed]) if restored else []
    left = verify(recipe.cache).damages
    if left:
        raise CorruptError(
            "the cache cannot be mended",
            expected="what was committed",
            found=f"{len(left)} damaged objects",
            where=left[0].key,
            remedy="Build it anew in another folder.",
        )
    return Repaired(tuple(dict.fromkeys(restored)), tuple(revised), tuple(removed))


def _broken_documents(objects: Objects) -> list[str]:
    """Ledger documents that do not parse, or lie where another belongs."""
    keys = [PLAN, CALIBRATION, MANIFEST]
    keys += [key for folder in ("ledger/seals", "ledger/extensions", "ledger/units") for key in objects.list(folder)]
    broken = []
    for key in keys:
        try:
            document = read_document(objects, key)
            if document.to_bytes() != objects.read(key) or (key.startswith(UNITS) and key != unit_key_of(document)):
                broken.append(key)
        except SignalStoreError:
            broken.append(key)
    return broken


def _units_without_record(objects: Objects, num_units: int) -> list[int]:
    return [unit for unit, record in enumerate(newest_records(objects, num_units)) if record is None]


def _mend(recipe: CacheRecipe, objects: Objects, damages: Sequence[Damage]) -> list[int]:
    """Mend what a verification named; returns the units that could only be revised."""
    restore_plan(recipe, objects)
    restore_calibration_copies(objects)
    calibrated = calibrate(recipe)
    units = sorted({d.unit for d in damages if d.unit is not None})
    revised = _mend_units(calibrated, objects, units)
    records = [document for document in newest_records(objects, calibrated.plan.num_units) if document is not None]
    if revised:
        seal(recipe.cache)
    else:
        _rewrite_generations(calibrated, objects, records)
    return revised


def _mend_units(calibrated: Calibrated, objects: Objects, units: Sequence[int]) -> list[int]:
    """Compute units anew; publish the same bytes under the standing record, or commit the next revision."""
    revised = []
    with progress_bar() as progress:
        bar = progress.add_task("repair", total=len(units), unit="units")
        for unit in units:
            if not _mend_unit(calibrated, objects, unit):
                revised.append(unit)
            progress.advance(bar)
    return revised


def _mend_unit(calibrated: Calibrated, objects: Objects, unit: int) -> bool:
    """Whether the unit came out as it was recorded, or had no record any more."""
    revision = 0
    while objects.exists(unit_key(unit, revision + 1)):
        revision += 1
    attempt = new_attempt()
    prefix = staging_prefix(f"{unit:07d}", attempt)
    try:
        record = compute_unit(calibrated, objects, unit, revision, prefix)
        standing = find_document(objects, unit_key(unit, revision))
        same = standing is None or digest(standing.body["shards"]) == digest(record.to_body()["shards"])
        if not same:
            record = UnitRecord(record.cache_id, unit, revision + 1, record.shards, record.saturation)
        if standing is None or not same:
            commit(objects, unit_key(unit, record.revision), record.to_body(), attempt)
        for spec in calibrated.manifest.specs:
            for shard in range(spec.shards_per_unit):
                key = spec.shard_key(unit * spec.shards_per_unit + shard)
                objects.publish(f"{prefix}/{key}", key)
    finally:
        objects.delete_tree(prefix)
    return same


def _rewrite_generations(calibrated: Calibrated, objects: Objects, records: Sequence[Document]) -> None:
    """Write constants and metadata of every generation again: they follow from the records and come out the same."""
    newest = newest_generation(objects)
    assert newest is not None
    for generation in range(newest + 1):
        sealed = Seal.from_body(read_document(objects, seal_key(generation)).body)
        planned = calibrated.plan.at_generation(sealed.num_extensions)
        if sealed.num_units != planned.num_units:
            raise CorruptError(
                "a seal and its plan differ", expected=sealed.num_units, found=planned.num_units, where=seal_key(generation)
            )
        of_seal = [UnitRecord.from_body(d.body) for d in records[: sealed.num_units]]
        if digest([record.to_body() for record in of_seal]) == sealed.content_digest:
            write_generation(objects, planned, calibrated.manifest, of_seal, generation)
    objects.delete_tree(STAGING)
