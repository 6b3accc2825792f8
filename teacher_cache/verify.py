"""verify: re-read everything a sealed cache consists of, and name each object that is not what was committed.

Nothing of the reader is trusted here: every byte of every shard, constant, zarr.json and ledger document is hashed anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from signal_store.arrays import ArraySpec
from signal_store.cache import newest_generation, sealed_metadata
from signal_store.canonical import digest, sha256
from signal_store.errors import CorruptError, NotFoundError, SignalStoreError, StorageError
from signal_store.ledger import (
    CALIBRATION,
    MANIFEST,
    PLAN,
    UNITS,
    Document,
    UnitRecord,
    extension_key,
    is_record_of,
    plan_unit_key,
    read_document,
    seal_key,
    tokenizer_key,
    unit_key,
)
from signal_store.manifest import Manifest, parse_manifest
from signal_store.objects import Objects, join_uri, objects_at
from signal_store.progress import progress_bar
from signal_store.seal_record import Seal
from teacher_cache.calibrate import calibration_keys
from teacher_cache.workers import CLAIMS


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
        self.seen.add(key)
        data = self.objects.read(key)
        self.num_bytes += len(data)
        return data

    def document(self, key: str) -> Document:
        """A ledger document that is whole to the byte, its `about` too."""
        data = self.read(key)
        document = read_document(self.objects, key)
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
    if newest is None:
        where = join_uri(uri, seal_key(0))
        raise NotFoundError("the cache is not sealed", where=where, remedy="Run teacher-cache build to finish it, or repair.")
    manifest = parse_manifest(reader.document(MANIFEST).body, MANIFEST)
    seal_document = reader.document(seal_key(newest))
    seal = Seal.from_body(seal_document.body)
    with progress_bar() as progress:
        bar = progress.add_task("verify", total=seal.num_units, unit="units")
        damages = list(_ledger(reader, manifest, seal))
        damages += _constants_and_metadata(reader, manifest, seal)
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
        key = plan_unit_key(number, unit["digest"])
        if (what := reader.differs(key, unit["digest"])) is not None:
            yield Damage(key, what)
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


def _constants_and_metadata(reader: _Reader, manifest: Manifest, seal: Seal) -> Iterator[Damage]:
    generations = [Seal.from_body(read_document(reader.objects, seal_key(g)).body) for g in range(seal.generation)]
    for sealed in (*generations, seal):
        for key, expected in sealed.constants.items():
            if (what := reader.differs(key, expected)) is not None:
                yield Damage(key, what)
    written: dict[str, str] = {}  # a generation replaces what it shares with the one before
    for sealed in (*generations, seal):
        written |= sealed.metadata
    computed = {key: sha256(data) for key, data in sealed_metadata(manifest, seal).items()}
    for key, expected in written.items():
        if (what := reader.differs(key, expected)) is not None:
            yield Damage(key, what)
        elif key in seal.metadata and computed.get(key) != expected:
            yield Damage(key, "not what this version of zarr writes for the manifest")


def _unit(reader: _Reader, manifest: Manifest, unit: int, records: list[UnitRecord]) -> Iterator[Damage]:
    """The newest record of a unit and its shards; older revisions' records are looked at too."""
    revision = 0
    while reader.objects.exists(unit_key(unit, revision + 1)):
        if isinstance(found := _document(reader, unit_key(unit, revision)), Damage):
            yield Damage(found.key, found.what, unit)
        revision += 1
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
    """Objects that do not belong; what workers leave in staging and claims is inert and not counted."""
    try:
        keys = objects.list("")
    except StorageError:
        return False, []
    inert = ("ledger/staging/", f"{CLAIMS}/")
    return True, [Damage(key, "does not belong to the cache") for key in keys if key not in seen and not key.startswith(inert)]
