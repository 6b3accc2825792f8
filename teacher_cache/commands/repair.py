"""repair: make a damaged cache whole again. What no unit owns follows from recipe and records; damaged units are computed anew.

Where a unit comes out the same to the byte, as it does on the kind of machine that made it, its record stands. Elsewhere it gets
a record of the next revision, and the cache a new generation: an older one that was opened keeps what it had of whole units. An
extension that is being made is left as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from run_kit.progress import progress_bar
from signal_store.cache import newest_generation, sealed_metadata
from signal_store.canonical import digest, sha256
from signal_store.errors import CorruptError, NotFoundError
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import (
    PLAN,
    Document,
    UnitRecord,
    commit,
    listed_records,
    new_attempt,
    newest_revision,
    read_document,
    seal_key,
    staging_prefix,
    unit_key,
    unit_key_of,
)
from signal_store.ledger.seal import Seal
from teacher_cache.builder.calibrate import Calibrated, calibrate_planned
from teacher_cache.builder.fill import compute_unit
from teacher_cache.builder.mend_ledger import Known, mend_calibration, mend_plan, mend_seals, whole_document
from teacher_cache.builder.plan import read_plan
from teacher_cache.builder.seal import draft_generation, listed_seals, newest_records, seal
from teacher_cache.commands.verify import verify
from teacher_cache.recipe import CacheRecipe


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was mended: objects that are what they were, units that were computed again, of these the ones that came out otherwise
    and got a new revision, and strangers in the cache's own folders that were removed."""

    restored: tuple[str, ...]
    computed_units: tuple[int, ...]
    revised_units: tuple[int, ...]
    removed: tuple[str, ...]


def repair(recipe: CacheRecipe) -> Repaired:
    """Mend the cache of a recipe; CorruptError or MismatchError, and nothing is removed, if it cannot be."""
    objects = objects_at(recipe.cache)
    known = Known.of(objects)
    if not known.seals and not objects.exists(PLAN) and not any(listed_records(objects)):
        raise NotFoundError("no cache here", expected="one to mend", where=objects.uri, remedy="teacher-cache build makes one.")
    restored = mend_plan(recipe, objects, known) + mend_calibration(recipe, objects, known)
    calibrated = calibrate_planned(recipe, read_plan(objects))
    sealed_units = max((sealed.num_units for sealed in known.seals.values()), default=calibrated.plan.at_generation(0).num_units)
    bad = _bad_records(objects)
    newest = dict(sorted(listed_records(objects)))
    lost = sorted({unit for unit, revision in bad if revision == newest[unit]} | (set(range(sealed_units)) - newest.keys()))
    for unit, revision in bad:
        restored.append(unit_key(unit, revision))
        objects.delete(unit_key(unit, revision))  # it says nothing that can be trusted; its unit is computed again
    revised = set(_mend_units(calibrated, objects, lost))
    records = _records(objects, calibrated.plan.num_units)
    restored += mend_seals(objects, calibrated.manifest, records, known)
    seal_if_complete(recipe, objects, calibrated)
    damages = verify(recipe.cache).damages
    removed = [d.key for d in damages if d.what == "does not belong to the cache"]
    for key in removed:
        objects.delete(key)
    kept = [d for d in damages if d.key not in removed]
    restored += [d.key for d in kept]
    units = sorted({d.unit for d in kept if d.unit is not None})
    revised |= set(_mend_units(calibrated, objects, units))
    if kept or lost:
        seal_if_complete(recipe, objects, calibrated)
        _restore_constants(objects, calibrated, [d.key for d in kept if d.unit is None])
    left = verify(recipe.cache).damages
    if left:
        raise CorruptError(
            "the cache cannot be mended",
            expected="what was committed",
            found=f"{len(left)} damaged objects",
            where=left[0].key,
            remedy="Build it anew in another folder.",
        )
    computed = tuple(sorted({*lost, *units}))
    return Repaired(tuple(dict.fromkeys(restored)), computed, tuple(sorted(revised)), tuple(removed))


def seal_if_complete(recipe: CacheRecipe, objects: Objects, calibrated: Calibrated) -> None:
    """Seal what is finished: the next generation where records are not those of the newest seal."""
    if len(_records(objects, calibrated.plan.num_units)) == calibrated.plan.num_units:
        seal(recipe.cache)
    elif newest_generation(objects) is None:
        raise CorruptError("the cache was never sealed", where=recipe.cache, remedy="Run teacher-cache build.")


def _records(objects: Objects, num_units: int) -> list[UnitRecord]:
    """The newest records of the units from the first on, up to one that has none."""
    found: list[UnitRecord] = []
    for document in newest_records(objects, num_units):
        if document is None:
            break
        found.append(UnitRecord.from_body(document.body))
    return found


def _bad_records(objects: Objects) -> list[tuple[int, int]]:
    """Unit records that are not whole, or lie where another belongs."""
    found: list[tuple[int, int]] = []
    for unit, revision in listed_records(objects):
        document = whole_document(objects, unit_key(unit, revision))
        if document is None or unit_key_of(document) != unit_key(unit, revision):
            found.append((unit, revision))
    return found


def _mend_units(calibrated: Calibrated, objects: Objects, units: Sequence[int]) -> list[int]:
    """Compute units anew; publish the same bytes under the standing record, or commit the next revision. Those revised."""
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
    revision = newest_revision(objects, unit)
    attempt = new_attempt()
    prefix = staging_prefix(f"{unit:07d}", attempt)
    try:
        record = compute_unit(calibrated, objects, unit, revision, prefix)
    except BaseException:
        objects.delete_tree(prefix)
        raise
    standing: Document | None = whole_document(objects, unit_key(unit, revision))
    same = standing is None or digest(standing.body["shards"]) == digest(record.to_body()["shards"])
    if not same:
        record = UnitRecord(record.cache_id, unit, revision + 1, record.shards, record.saturation)
    if standing is None or not same:
        _, mine = commit(objects, unit_key(unit, record.revision), record.to_body(), attempt)
        if not mine:  # another repair was first, and its bytes are the ones that count
            objects.delete_tree(prefix)
            return same
    for spec in calibrated.manifest.specs:
        for shard in range(spec.shards_per_unit):
            key = spec.shard_key(unit * spec.shards_per_unit + shard)
            objects.publish(f"{prefix}/{key}", key)
    objects.delete_tree(prefix)
    return same


def _restore_constants(objects: Objects, calibrated: Calibrated, damaged: Sequence[str]) -> None:
    """Write again the damaged objects that no unit owns, where they come out here as they were sealed."""
    seals = [Seal.from_body(read_document(objects, seal_key(number)).body) for number in listed_seals(objects)]
    wanted = {key: content for sealed in seals for key, content in {**sealed.constants, **sealed.metadata}.items()}
    left = set(damaged) & wanted.keys()
    records = _records(objects, calibrated.plan.num_units)
    for sealed in seals:
        for key, data in sealed_metadata(calibrated.manifest, sealed).items():
            if key in left and sha256(data) == wanted[key]:
                objects.put(key, data)
                left.remove(key)
        planned = calibrated.plan.at_generation(sealed.num_extensions)
        if left & sealed.constants.keys() and len(records) >= planned.num_units:
            draft = draft_generation(objects, planned, calibrated.manifest, records[: planned.num_units], sealed.generation)
            for key, content in draft.staged.items():
                if key in left and content == wanted[key]:
                    objects.publish(f"{draft.prefix}/{key}", key)
                    left.remove(key)
            objects.delete_tree(draft.prefix)
