"""seal: publish what is staged, pack the unit records, write the hierarchy's metadata, and create the seal of a generation.

After it, the cache is complete and readable by any zarr reader. Everything here is a function of committed documents, so that
sealing twice, or after a kill, gives the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import newest_generation, sealed_metadata
from signal_store.canonical import digest, sha256
from signal_store.errors import CorruptError, IncompleteError, MismatchError, NotFoundError
from signal_store.format.arrays import ArraySpec
from signal_store.io.objects import Objects, objects_at
from signal_store.io.shard_writer import write_unit_array
from signal_store.ledger.documents import (
    CALIBRATION,
    MANIFEST,
    PLAN,
    SEALS,
    STAGING,
    Document,
    UnitRecord,
    calibration_keys,
    commit,
    extension_key,
    find_document,
    is_record_of,
    listed_records,
    new_attempt,
    plan_unit_key,
    read_document,
    seal_key,
    tokenizer_key,
    unit_key,
)
from signal_store.ledger.seal import Seal, constant_spec, pack_records, units_group
from signal_store.manifest import Manifest, parse_manifest
from teacher_cache.builder.calibrate import read_calibration_arrays
from teacher_cache.builder.fill import publish_unit
from teacher_cache.builder.plan import Plan, read_plan
from teacher_cache.builder.worker_notes import NOTES
from teacher_cache.builder.workers import CLAIMS


def seal(uri: str) -> Seal:
    """Seal the cache at an address; IncompleteError, with the numbers of the missing units, if some are not filled.

    A cache whose newest seal covers all that is committed is left as it is, but for what kills have left in staging.
    """
    objects = objects_at(uri)
    if not objects.exists(PLAN):
        raise NotFoundError("no cache here", expected="one made by teacher-cache", found=uri)
    planned = read_plan(objects)
    frozen = find_document(objects, MANIFEST)
    if frozen is None:
        remedy = "Run teacher-cache repair." if listed_seals(objects) else "Run teacher-cache build."
        raise IncompleteError("the cache has no manifest", found="a plan", where=uri, remedy=remedy)
    manifest = parse_manifest(frozen.body, MANIFEST)
    found = newest_records(objects, planned.num_units)
    missing = [unit for unit, record in enumerate(found) if record is None]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise IncompleteError(
            "the cache is not filled",
            expected=f"{planned.num_units} units",
            found=f"{len(missing)} missing: {shown}",
            where=uri,
            remedy="Run teacher-cache fill with its recipe.",
        )
    documents = [document for document in found if document is not None]
    records = [UnitRecord.from_body(document.body) for document in documents]
    content = digest([record.to_body() for record in records])
    newest = newest_generation(objects)
    refuse_seal_gap(objects, uri)
    standing = None if newest is None else Seal.from_body(read_document(objects, seal_key(newest)).body)
    if standing is not None and standing.content_digest == content:
        _sweep(objects)
        return standing
    for unit, document in enumerate(documents):
        revision = document.body.get("revision", 0)
        if not is_record_of(document, manifest.cache_id, unit, revision):
            found_in = {name: document.body.get(name) for name in ("cache_id", "unit")}
            expected_in = {"cache_id": manifest.cache_id, "unit": unit}
            raise MismatchError(
                "the record of another unit or cache", expected=expected_in, found=found_in, where=unit_key(unit, revision)
            )
        publish_unit(objects, document, manifest.specs)
    _check_planned(objects, planned)
    _check_lengths(objects, manifest, records)
    generation = 0 if standing is None else standing.generation + 1
    sealed = _commit_draft(objects, draft_generation(objects, planned, manifest, records, generation))
    _sweep(objects)
    return sealed


def listed_seals(objects: Objects) -> list[int]:
    """Numbers of the generations that have a seal, ascending."""
    return sorted(int(found[1]) for key in objects.list(SEALS) if (found := re.fullmatch(r"(\d+)\.json", key.rsplit("/", 1)[1])))


def refuse_seal_gap(objects: Objects, uri: str) -> None:
    """CorruptError where the seal of an older generation is gone: the next would take its number."""
    numbers = listed_seals(objects)
    if numbers != list(range(len(numbers))):
        raise CorruptError(
            "the seal of an older generation is gone",
            expected=f"seals 0 to {numbers[-1]}",
            found=numbers,
            where=uri,
            remedy="Run teacher-cache repair with its recipe.",
        )


def newest_records(objects: Objects, num_units: int) -> list[Document | None]:
    """The newest record of each unit, or None."""
    revisions: dict[int, int] = {}
    for unit, revision in listed_records(objects):
        revisions[unit] = max(revision, revisions.get(unit, 0))
    return [read_document(objects, unit_key(unit, revisions[unit])) if unit in revisions else None for unit in range(num_units)]


@dataclass(frozen=True, slots=True)
class Draft:
    """A generation that is worked out and not published: the seal's `body`, every zarr.json, and the constant objects, staged below
    `prefix`, by key with their sha256."""

    body: dict[str, Any]
    metadata: dict[str, bytes]
    prefix: str
    staged: dict[str, str]


def draft_generation(objects: Objects, planned: Plan, manifest: Manifest, records: Sequence[UnitRecord], generation: int) -> Draft:
    """Packed records, constants and metadata of a generation, a function of committed documents. What calibration made is of
    generation 0 for ever: a later one names the same objects."""
    prefix = f"{STAGING}/seal.{new_attempt()}"
    parent = None if generation == 0 else read_document(objects, seal_key(generation - 1))
    arrays: dict[ArraySpec, int] = {}
    digests: dict[str, str] = {}
    if parent is not None:
        before = Seal.from_body(parent.body)
        arrays |= {spec: rows for spec, rows in before.constant_specs.items() if spec.path.startswith("calibration/")}
        digests |= {key: content for key, content in before.constants.items() if key.startswith("calibration/")}
    staged = {}
    for path, rows in sorted(_constant_rows(objects, planned, manifest, records, generation).items()):
        spec = constant_spec(path, rows)
        arrays[spec] = len(rows)
        for shard, record in enumerate(write_unit_array(objects, prefix, spec, 0, rows)):
            staged[spec.shard_key(shard)] = record.sha256
    draft = Seal(
        cache_id=manifest.cache_id,
        generation=generation,
        parent=None if parent is None else parent.digest,
        num_units=planned.num_units,
        num_segments=sum(unit["segments"] for unit in planned.units),
        content_digest=digest([record.to_body() for record in records]),
        metadata={},
        constant_arrays=tuple({**spec.to_json(), "rows": rows} for spec, rows in arrays.items()),
        constants=digests | staged,
        tokenizer=planned.document.body["tokenizer"]["files"],
        ledger=_ledger_digests(objects, planned),
        sources=tuple(source.model_dump(mode="json") for source in planned.sources[len(manifest.sources) :]),
    )
    metadata = sealed_metadata(manifest, draft)
    return Draft({**draft.to_body(), "metadata": {key: sha256(data) for key, data in metadata.items()}}, metadata, prefix, staged)


def _commit_draft(objects: Objects, draft: Draft) -> Seal:
    """Publish it and create its seal; MismatchError, and nothing is published, where another seal of this generation stands."""
    key = seal_key(draft.body["generation"])
    standing = find_document(objects, key)
    if standing is None:
        for constant in draft.staged:
            objects.publish(f"{draft.prefix}/{constant}", constant)
        write_metadata(objects, draft.metadata)
        standing, _ = commit(objects, key, draft.body, new_attempt())
    objects.delete_tree(draft.prefix)
    if standing.digest != digest(draft.body):
        raise MismatchError("another worker sealed other units", expected=digest(draft.body), found=standing.digest, where=key)
    return Seal.from_body(standing.body)


def _ledger_digests(objects: Objects, planned: Plan) -> dict[str, str]:
    found = {PLAN: planned.digest, CALIBRATION: read_document(objects, CALIBRATION).digest}
    return found | {extension_key(g): document.digest for g, document in enumerate(planned.extensions, start=1)}


def _constant_rows(
    objects: Objects, planned: Plan, manifest: Manifest, records: Sequence[UnitRecord], generation: int
) -> dict[str, NDArray[np.generic]]:
    """Rows of every array that no unit owns and this generation writes: calibration, packed records, the plan's facts of units."""
    arrays: dict[str, NDArray[np.generic]] = {}
    if generation == 0:
        calibration = read_document(objects, CALIBRATION).body
        arrays |= {
            f"calibration/{name.replace('/', '.', name.count('/') - 1)}": array
            for name, array in read_calibration_arrays(objects, calibration["arrays_digest"]).items()
            if array.size
        }
    arrays |= pack_records(records, manifest.specs, generation)
    plan = f"{units_group(generation)}/plan"
    for name in ("segments", "tokens"):
        arrays[f"{plan}/{name}"] = np.asarray([unit[name] for unit in planned.units], dtype=np.uint32)
    arrays[f"{plan}/is_validation"] = np.asarray([unit["split"] == "validation" for unit in planned.units], dtype=np.uint8)
    return arrays


def write_metadata(objects: Objects, metadata: dict[str, bytes]) -> None:
    """Every zarr.json, the root's last: it is the switch that shows the arrays to stock readers."""
    for key in sorted(metadata, key=lambda k: (k == "zarr.json", k)):
        objects.put(key, metadata[key])


def _check_planned(objects: Objects, planned: Plan) -> None:
    """CorruptError where a tokenizer file or a copy of the calibration is not what it was, or a unit's plan is gone: the cache
    would be sealed damaged."""
    files: dict[str, str] = planned.document.body["tokenizer"]["files"]
    arrays: str = read_document(objects, CALIBRATION).body["arrays_digest"]
    wanted = {tokenizer_key(name): content for name, content in files.items()} | dict.fromkeys(calibration_keys(arrays), arrays)
    altered = [key for key, content in wanted.items() if not objects.exists(key) or sha256(objects.read(key)) != content]
    keys = (plan_unit_key(number, unit["digest"]) for number, unit in enumerate(planned.units))
    gone = [key for key in keys if not objects.exists(key)]
    if lost := altered + gone:
        raise CorruptError(
            "an object that was made before is gone or altered",
            expected="what was planned and calibrated",
            found=f"{len(lost)} such objects",
            where=lost[0],
            remedy="Run teacher-cache repair with its recipe.",
        )


def _check_lengths(objects: Objects, manifest: Manifest, records: Sequence[UnitRecord]) -> None:
    for record in records:
        for spec in manifest.specs:
            for shard, expected in enumerate(record.shards[spec.path]):
                key = spec.shard_key(record.unit * spec.shards_per_unit + shard)
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
    objects.delete_tree(NOTES)
