"""seal: publish what is staged, pack the unit records, write the hierarchy's metadata, and create the seal of a generation.

After it, the cache is complete and readable by any zarr reader. Everything here is a function of committed documents, so that
sealing twice, or after a kill, gives the same bytes.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from signal_store.canonical import digest
from signal_store.errors import CorruptError, IncompleteError, MismatchError, NotFoundError
from signal_store.io.objects import Objects
from signal_store.ledger.catalogue import calibration_entries, shard_keys, text_entries, tokenizer_entries
from signal_store.ledger.documents import (
    CLAIMS,
    MANIFEST,
    PLAN,
    STAGING,
    WORKERS,
    Document,
    UnitRecord,
    commit,
    find_document,
    is_record_of,
    listed_seals,
    new_attempt,
    newest_generation,
    newest_records,
    read_document,
    seal_key,
    unit_key,
)
from signal_store.ledger.entries import Ledger
from signal_store.ledger.seal import Seal
from signal_store.manifest import Manifest, parse_manifest
from teacher_cache.builder.fill import publish_unit
from teacher_cache.builder.generation import Draft, draft_generation, publish_constants, write_metadata
from teacher_cache.builder.plan import Plan, read_plan


def seal_cache(objects: Objects) -> Seal:
    """Seal the cache at a place; IncompleteError, with the numbers of the missing units, if some are not filled.

    A cache whose newest seal covers all that is committed is left as it is, but for what kills have left in staging.
    """
    planned, manifest = _planned_and_frozen(objects)
    documents = _every_record(objects, planned.num_units)
    records = [UnitRecord.from_body(document.body) for document in documents]
    _refuse_seal_gap(objects)
    newest = newest_generation(objects)
    standing = None if newest is None else Seal.from_body(read_document(objects, seal_key(newest)).body)
    if standing is not None and standing.content_digest == digest([record.to_body() for record in records]):
        _sweep(objects)
        return standing
    for unit, document in enumerate(documents):
        _refuse_another_unit(document, manifest, unit)
        publish_unit(objects, document, manifest.specs)
    _check_planned(objects)
    _check_lengths(objects, manifest, records)
    generation = 0 if standing is None else standing.generation + 1
    sealed = _commit_draft(objects, draft_generation(objects, planned, manifest, records, generation))
    _sweep(objects)
    return sealed


def _planned_and_frozen(objects: Objects) -> tuple[Plan, Manifest]:
    if not objects.exists(PLAN):
        raise NotFoundError("no cache here", expected="one made by teacher-cache", found=objects.uri)
    planned = read_plan(objects)
    frozen = find_document(objects, MANIFEST)
    if frozen is None:
        remedy = "Run teacher-cache repair." if listed_seals(objects) else "Run teacher-cache build."
        raise IncompleteError("the cache has no manifest", found="a plan", where=objects.uri, remedy=remedy)
    return planned, parse_manifest(frozen.body, MANIFEST)


def _every_record(objects: Objects, num_units: int) -> list[Document]:
    found = newest_records(objects, num_units)
    missing = [unit for unit, record in enumerate(found) if record is None]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise IncompleteError(
            "the cache is not filled",
            expected=f"{num_units} units",
            found=f"{len(missing)} missing: {shown}",
            where=objects.uri,
            remedy="Run teacher-cache fill with its recipe.",
        )
    return [document for document in found if document is not None]


def _refuse_seal_gap(objects: Objects) -> None:
    """CorruptError where the seal of an older generation is gone: the next would take its number."""
    numbers = listed_seals(objects)
    if numbers != list(range(len(numbers))):
        raise CorruptError(
            "the seal of an older generation is gone",
            expected=f"seals 0 to {numbers[-1]}",
            found=numbers,
            where=objects.uri,
            remedy="Run teacher-cache repair with its recipe.",
        )


def _refuse_another_unit(document: Document, manifest: Manifest, unit: int) -> None:
    revision = document.body.get("revision", 0)
    if not is_record_of(document, manifest.cache_id, unit, revision):
        found = {name: document.body.get(name) for name in ("cache_id", "unit")}
        expected = {"cache_id": manifest.cache_id, "unit": unit}
        where = unit_key(unit, revision)
        raise MismatchError("the record of another unit or cache", expected=expected, found=found, where=where)


def _commit_draft(objects: Objects, draft: Draft) -> Seal:
    """Publish it and create its seal; MismatchError, and nothing is published, where another seal of this generation stands."""
    key = seal_key(draft.body["generation"])
    standing = find_document(objects, key)
    if standing is None:
        publish_constants(objects, draft)
        write_metadata(objects, draft.metadata)
        standing, _ = commit(objects, key, draft.body, new_attempt())
    objects.delete_tree(draft.prefix)
    if standing.digest != digest(draft.body):
        raise MismatchError("another worker sealed other units", expected=digest(draft.body), found=standing.digest, where=key)
    return Seal.from_body(standing.body)


def _check_planned(objects: Objects) -> None:
    """CorruptError where a tokenizer file, the calibration or a copy of its matrices is not what it was, or a unit's plan is gone:
    the cache would be sealed damaged."""
    ledger = Ledger(objects, listed_seals(objects))
    lost = ledger.failing(chain(tokenizer_entries(ledger), calibration_entries(ledger)))
    lost += [entry for entry in text_entries(ledger) if not objects.exists(entry.key)]
    if lost:
        raise CorruptError(
            "an object that was made before is gone or altered",
            expected="what was planned and calibrated",
            found=f"{len(lost)} such objects",
            where=lost[0].key,
            remedy="Run teacher-cache repair with its recipe.",
        )


def _check_lengths(objects: Objects, manifest: Manifest, records: Sequence[UnitRecord]) -> None:
    for record in records:
        for spec in manifest.specs:
            for key, expected in zip(shard_keys(spec, record.unit), record.shards[spec.path], strict=True):
                found: Any = objects.size(key)
                if found != expected.length:
                    raise CorruptError(
                        "a published object is not what was committed",
                        expected=f"{expected.length} bytes",
                        found=found,
                        where=key,
                        remedy="`teacher-cache repair` with its recipe computes its unit again.",
                    )


def _sweep(objects: Objects) -> None:
    """Remove what kills and lost races left behind."""
    objects.delete_tree(STAGING)
    objects.delete_tree(CLAIMS)
    objects.delete_tree(WORKERS)
