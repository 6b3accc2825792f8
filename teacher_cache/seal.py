"""seal: publish what is staged, pack the unit records, write the hierarchy's metadata, and create the seal.

After it, the cache is complete and readable by any zarr reader. Everything here is a function of committed documents, so that
sealing twice, or after a kill, gives the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from signal_store.arrays import ArraySpec, hierarchy_metadata
from signal_store.canonical import digest, sha256
from signal_store.errors import IncompleteError, MismatchError, NotFoundError
from signal_store.ledger import (
    CALIBRATION,
    MANIFEST,
    PLAN,
    STAGING,
    UnitRecord,
    commit,
    find_document,
    new_attempt,
    read_document,
    seal_key,
)
from signal_store.manifest import FORMAT_VERSION, Manifest, parse_manifest
from signal_store.objects import LocalObjects, Objects
from signal_store.seal_record import Seal, constant_spec, pack_records
from signal_store.shard_writer import write_unit_array
from teacher_cache.calibrate import read_calibration_arrays
from teacher_cache.fill import committed_units, publish_unit


@dataclass(frozen=True, slots=True)
class _Constants:
    """Arrays that no unit owns, with the bytes of their objects already published."""

    arrays: dict[ArraySpec, int]
    digests: dict[str, str]


def seal(cache: Path) -> Seal:
    """Seal the cache at a path; IncompleteError, with the numbers of the missing units, if some are not filled."""
    objects = LocalObjects(cache)
    standing = find_document(objects, seal_key(0))
    if standing is not None:
        objects.delete_tree(STAGING)
        return Seal.from_body(standing.body)
    frozen, planned = find_document(objects, MANIFEST), find_document(objects, PLAN)
    if planned is None:
        raise NotFoundError("no cache here", expected="a folder made by teacher-cache", found=cache)
    if frozen is None:
        raise IncompleteError("the cache is not calibrated", found="a plan", where=cache, remedy="Run teacher-cache build.")
    manifest = parse_manifest(frozen.body, MANIFEST)
    units = planned.body["units"]
    found = list(committed_units(objects, len(units)))
    missing = [unit for unit, record in enumerate(found) if record is None]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise IncompleteError(
            "the cache is not filled",
            expected=f"{len(units)} units",
            found=f"{len(missing)} missing: {shown}",
            where=cache,
            remedy="Run teacher-cache fill with its recipe.",
        )
    records = []
    for document in found:
        assert document is not None
        if document.body["cache_id"] != manifest.cache_id:
            raise MismatchError(
                "a unit belongs to another cache", expected=manifest.cache_id, found=document.body["cache_id"], where=cache
            )
        publish_unit(objects, document, manifest.specs)
        records.append(UnitRecord.from_body(document.body))
    constants = _write_constants(objects, manifest, records, units)
    metadata = _write_metadata(objects, manifest, constants, len(units))
    body = Seal(
        cache_id=manifest.cache_id,
        generation=0,
        parent=None,
        num_units=len(units),
        content_digest=digest([record.to_body() for record in records]),
        metadata=metadata,
        constants=constants.digests,
    )
    document, _ = commit(objects, seal_key(0), body.to_body(), new_attempt())
    objects.delete_tree(STAGING)
    return Seal.from_body(document.body)


def _write_constants(objects: Objects, manifest: Manifest, records: list[UnitRecord], units: list[dict[str, object]]) -> _Constants:
    calibration = read_document(objects, CALIBRATION).body
    arrays: dict[str, NDArray[np.generic]] = {
        f"calibration/{name.replace('/', '.', name.count('/') - 1)}": array
        for name, array in read_calibration_arrays(objects, calibration["arrays_digest"]).items()
        if array.size
    }
    arrays |= pack_records(records, manifest.specs)
    for name, kind in (("segments", np.uint32), ("tokens", np.uint32)):
        arrays[f"units/plan/{name}"] = np.asarray([unit[name] for unit in units], dtype=kind)
    arrays["units/plan/is_validation"] = np.asarray([unit["split"] == "validation" for unit in units], dtype=np.uint8)
    specs, digests = {}, {}
    prefix = f"{STAGING}/seal.{new_attempt()}"
    for path, rows in sorted(arrays.items()):
        spec = constant_spec(path, rows)
        write_unit_array(objects, prefix, spec, 0, rows)
        for shard in range(spec.shards_per_unit):
            key = spec.shard_key(shard)
            digests[key] = sha256(objects.read(f"{prefix}/{key}"))
            objects.publish(f"{prefix}/{key}", key)
        specs[spec] = len(rows)
    return _Constants(specs, digests)


def _write_metadata(objects: Objects, manifest: Manifest, constants: _Constants, num_units: int) -> dict[str, str]:
    """Every zarr.json, the root's last: it is the switch that shows the arrays to stock readers."""
    arrays = {spec: num_units * spec.capacity_rows for spec in manifest.specs} | constants.arrays
    attributes = {"format": "teacher-cache", "format_version": str(FORMAT_VERSION), "cache_id": manifest.cache_id}
    metadata = hierarchy_metadata(arrays, attributes)
    for key in sorted(metadata, key=lambda k: (k == "zarr.json", k)):
        objects.put(key, metadata[key])
    return {key: sha256(data) for key, data in metadata.items()}
