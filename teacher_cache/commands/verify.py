"""verify: re-read everything a sealed cache consists of, and name each object that is not what was committed.

Nothing of the reader is trusted here: every byte of every shard, constant, zarr.json and ledger document is hashed anew.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from run_kit.progress import progress_bar
from signal_store.cache import newest_generation
from signal_store.canonical import digest, sha256
from signal_store.errors import CorruptError, NotFoundError, SignalStoreError, StorageError
from signal_store.format.arrays import ArraySpec
from signal_store.io.objects import Objects, join_uri, objects_at
from signal_store.ledger.documents import (
    CALIBRATION,
    MANIFEST,
    PLAN,
    STAGING,
    UNITS,
    Document,
    UnitRecord,
    calibration_keys,
    extension_key,
    is_record_of,
    newest_revision,
    parse_document,
    plan_unit_key,
    read_document,
    seal_key,
    tokenizer_key,
    unit_key,
)
from signal_store.ledger.seal import Seal
from signal_store.manifest import Manifest, parse_manifest
from signal_store.signals import Signals
from teacher_cache.builder.worker_notes import NOTES
from teacher_cache.builder.workers import CLAIMS

OWN_FOLDERS = frozenset(("ledger", "units", "calibration", "tokens", "segments", *Signals.model_fields, "tags"))


@dataclass(frozen=True, slots=True)
class Damage:
    """An object that is not what was committed. `unit`: whose it is, None for what no unit owns."""

    key: str
    what: str
    unit: int | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found, of how many objects and bytes."""

    damages: tuple[Damage, ...]
    num_objects: int
    num_bytes: int
    listed: bool
    """Whether the store could be listed, so that objects that do not belong were looked for."""


class _Reader:
    """Reads objects and keeps count."""

    def __init__(self, objects: Objects) -> None:
        self.objects, self.num_bytes = objects, 0
        self.seen: set[str] = set()

    def read(self, key: str) -> bytes:
        data = self.objects.read(key)
        self.num_bytes += 0 if key in self.seen else len(data)
        self.seen.add(key)
        return data

    def document(self, key: str) -> Document:
        """A ledger document that is whole to the byte, its `about` too."""
        data = self.read(key)
        document = parse_document(data, key)
        if document.to_bytes() != data:
            raise CorruptError("a ledger document is not as it was written", where=key)
        return document

    def differs(self, key: str, expected: str) -> str | None:
        """What is wrong with an object of a known digest."""
        try:
            found = sha256(self.read(key))
        except NotFoundError:
            return "gone"
        return None if found == expected else "altered"


def verify(uri: str) -> Verified:
    """Check the newest generation of a sealed cache; NotFoundError or CorruptError where not even manifest and seal can be read."""
    objects = objects_at(uri)
    reader = _Reader(objects)
    newest = newest_generation(objects)
    if newest is None and not objects.exists(PLAN):
        raise NotFoundError("no cache here", expected="one made by teacher-cache", found=uri)
    if newest is None:
        where = join_uri(uri, seal_key(0))
        raise NotFoundError("the cache is not sealed", where=where, remedy="Run teacher-cache build to finish it, or repair.")
    manifest = parse_manifest(reader.document(MANIFEST).body, MANIFEST)
    seal_document = reader.document(seal_key(newest))
    seal = Seal.from_body(seal_document.body)
    with progress_bar() as progress:
        bar = progress.add_task("verify", total=seal.num_units, unit="units")
        damages = list(_ledger(reader, manifest, seal))
        damages += _pending(reader, manifest, seal)
        damages += _constants_and_metadata(reader, seal)
        records: list[UnitRecord] = []
        for unit in range(seal.num_units):
            damages += _unit(reader, manifest, unit, records)
            progress.advance(bar)
    if len(records) == seal.num_units and digest([record.to_body() for record in records]) != seal.content_digest:
        damages.append(Damage(UNITS, "the records are not those that were sealed"))
    listed, strangers = _strangers(objects, reader.seen)
    return Verified((*damages, *strangers), len(reader.seen), reader.num_bytes, listed)


def _ledger(reader: _Reader, manifest: Manifest, seal: Seal) -> Iterator[Damage]:
    """Seals, plan, extensions, calibration, tokenizer: all that the seal names in the ledger."""
    parent = None
    for generation in range(seal.generation + 1):
        key = seal_key(generation)
        found = _document(reader, key)
        if isinstance(found, Damage):
            yield found
        elif found.body["parent"] != parent or found.body["cache_id"] != manifest.cache_id:
            yield Damage(key, "does not follow the seal before it")
        parent = None if isinstance(found, Damage) else found.digest
    units = []
    for key in [PLAN, *(extension_key(g) for g in range(1, 1 + seal.num_extensions))]:
        found = _document(reader, key, seal.ledger[key])
        if isinstance(found, Damage):
            yield found
        else:
            units += found.body["units"]
    for number, unit in enumerate(units):
        yield from _planned_unit(reader, number, unit["digest"])
    calibration = _document(reader, CALIBRATION, seal.ledger[CALIBRATION])
    if isinstance(calibration, Damage):
        yield calibration
    for key in calibration_keys(manifest.calibration.digest):
        if (what := reader.differs(key, manifest.calibration.digest)) is not None:
            yield Damage(key, what)
    for name, expected in seal.tokenizer.items():
        if (what := reader.differs(tokenizer_key(name), expected)) is not None:
            yield Damage(tokenizer_key(name), what)


def _document(reader: _Reader, key: str, expected: str | None = None) -> Document | Damage:
    try:
        document = reader.document(key)
    except SignalStoreError as error:
        return Damage(key, "gone" if isinstance(error, NotFoundError) else error.what)
    if expected is not None and document.digest != expected:
        return Damage(key, "not the document that was sealed")
    return document


def _constants_and_metadata(reader: _Reader, seal: Seal) -> Iterator[Damage]:
    """Objects that no unit owns, of all generations whose seals are whole."""
    generations = []
    for generation in range(seal.generation):
        with contextlib.suppress(CorruptError, NotFoundError):  # it was named before
            generations.append(Seal.from_body(read_document(reader.objects, seal_key(generation)).body))
    expected: dict[str, str] = {}  # a generation replaces the metadata that it shares with the one before
    for sealed in (*generations, seal):
        expected |= {**sealed.constants, **sealed.metadata}
    for key, content in expected.items():
        if (what := reader.differs(key, content)) is not None:
            yield Damage(key, what)


def _pending(reader: _Reader, manifest: Manifest, seal: Seal) -> Iterator[Damage]:
    """An extension that is not sealed yet: its plan, and the records of units that are finished already."""
    number, unit = seal.num_extensions + 1, seal.num_units
    while reader.objects.exists(extension_key(number)):
        found = _document(reader, extension_key(number))
        if isinstance(found, Damage):
            yield found
            return
        for planned in found.body["units"]:
            yield from _planned_unit(reader, unit, planned["digest"])
            for revision in range(newest_revision(reader.objects, unit) + 1):
                if reader.objects.exists(unit_key(unit, revision)):
                    record = _document(reader, unit_key(unit, revision))
                    if isinstance(record, Damage):
                        yield Damage(record.key, record.what, unit)
            for spec in manifest.specs:
                reader.seen.update(_shard_keys(spec, unit))  # published or not: the seal will look
            unit += 1
        number += 1


def _planned_unit(reader: _Reader, unit: int, content: str) -> Iterator[Damage]:
    key = plan_unit_key(unit, content)
    if (what := reader.differs(key, content)) is not None:
        yield Damage(key, what)


def _unit(reader: _Reader, manifest: Manifest, unit: int, records: list[UnitRecord]) -> Iterator[Damage]:
    """The newest record of a unit and its shards; older revisions' records are looked at too."""
    revision = newest_revision(reader.objects, unit)
    for older in range(revision):
        if reader.objects.exists(unit_key(unit, older)) and isinstance(found := _document(reader, unit_key(unit, older)), Damage):
            yield Damage(found.key, found.what, unit)
    document = _document(reader, unit_key(unit, revision))
    if not isinstance(document, Damage) and not is_record_of(document, manifest.cache_id, unit, revision):
        document = Damage(unit_key(unit, revision), "the record of another unit or cache")
    if isinstance(document, Damage):
        yield Damage(document.key, document.what, unit)
        for spec in manifest.specs:
            reader.seen.update(_shard_keys(spec, unit))
        return
    record = UnitRecord.from_body(document.body)
    records.append(record)
    for spec in manifest.specs:
        for key, shard in zip(_shard_keys(spec, unit), record.shards[spec.path], strict=True):
            if (what := reader.differs(key, shard.sha256)) is not None:
                yield Damage(key, what, unit)


def _shard_keys(spec: ArraySpec, unit: int) -> list[str]:
    return [spec.shard_key(unit * spec.shards_per_unit + shard) for shard in range(spec.shards_per_unit)]


def _strangers(objects: Objects, seen: set[str]) -> tuple[bool, list[Damage]]:
    """Objects in the cache's own folders that do not belong. What workers leave in staging, claims and notes is inert, and so are
    whole plans and calibrations of attempts that lost; files beside the cache's own folders are none of its business."""
    try:
        keys = objects.list("")
    except StorageError:
        return False, []
    strange = [key for key in keys if key not in seen and is_own(key) and not _is_inert(objects, key)]
    return True, [Damage(key, "does not belong to the cache") for key in strange]


def is_own(key: str) -> bool:
    """Whether a key lies where a cache puts its objects."""
    return key == "zarr.json" or key.split("/")[0] in OWN_FOLDERS


def _is_inert(objects: Objects, key: str) -> bool:
    if key.startswith((f"{STAGING}/", f"{CLAIMS}/", f"{NOTES}/")):
        return True
    named = re.fullmatch(r"ledger/(?:plan/\d{7}\.([0-9a-f]{16})|calibration/([0-9a-f]{16})(?:\.copy)?\.safetensors)", key)
    return named is not None and sha256(objects.read(key)).removeprefix("sha256:").startswith(named[1] or named[2])
