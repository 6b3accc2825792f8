"""A generation of a cache, worked out from committed documents: packed records, constants, metadata, and what its seal says.

A pure function of these documents: worked out twice, or by another process, it is the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.canonical import digest, sha256
from signal_store.format.arrays import ArraySpec
from signal_store.io.objects import Objects
from signal_store.io.shard_writer import write_unit_array
from signal_store.ledger.documents import (
    CALIBRATION,
    PLAN,
    STAGING,
    UnitRecord,
    extension_key,
    new_attempt,
    read_document,
    seal_key,
)
from signal_store.ledger.seal import Seal, constant_spec, pack_records, units_group
from signal_store.manifest import Manifest
from signal_store.sealed_part import sealed_metadata
from teacher_cache.builder.calibrate import read_calibration_arrays
from teacher_cache.builder.plan import Plan


@dataclass(frozen=True, slots=True)
class Draft:
    """A generation that is worked out and not published: the seal's `body`, every zarr.json, and the constant objects, staged below
    `prefix`, by key with their sha256."""

    body: dict[str, Any]
    metadata: dict[str, bytes]
    prefix: str
    staged: dict[str, str]


def publish_constants(objects: Objects, draft: Draft) -> None:
    """Move the staged constants to their keys."""
    for key in draft.staged:
        objects.publish(f"{draft.prefix}/{key}", key)


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
    staged: dict[str, str] = {}
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
