"""The ledger: what has been decided and finished, in documents that are created once and never changed.

An attempt writes all objects of its unit to staging, then creates the unit's record: that is the commit. Whoever sees a
record may move that attempt's objects to their zarr keys. A document is `{"body", "digest", "about", "about_digest"}`:
what differs between machines (attempt, host, times, versions) is in `about`, outside every comparison.
"""

import contextlib
import json
import platform
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from signal_store.canonical import digest, parse_json
from signal_store.errors import CorruptError, InputError, NotFoundError
from signal_store.io.objects import Objects
from signal_store.io.shard_writer import ShardRecord

PLAN = "ledger/plan.json"
CALIBRATION = "ledger/calibration.json"
MANIFEST = "ledger/manifest.json"
SEALS = "ledger/seals"
UNITS = "ledger/units"
STAGING = "ledger/staging"
TOKENIZER = "ledger/tokenizer"
EXTENSIONS = "ledger/extensions"
CLAIMS = "ledger/claims"
WORKERS = "ledger/workers"


def plan_unit_key(unit: int, content: str) -> str:
    """Where the tokens and positions of a unit are kept, as planned; the key names the content's digest."""
    return f"ledger/plan/{unit:07d}.{content.removeprefix('sha256:')[:16]}"


def extension_key(generation: int) -> str:
    """Where the plan of the units that a generation added is kept."""
    return f"{EXTENSIONS}/{generation:06d}.json"


def calibration_keys(arrays_digest: str) -> tuple[str, str]:
    """Where the calibrated matrices lie, twice: without the tail basis all tails are noise."""
    name = arrays_digest.removeprefix("sha256:")[:16]
    return f"ledger/calibration/{name}.safetensors", f"ledger/calibration/{name}.copy.safetensors"


def tokenizer_key(name: str) -> str:
    """Where a file of the tokenizer is kept."""
    return f"{TOKENIZER}/{name}"


def unit_key(unit: int, revision: int = 0) -> str:
    """Where the record of a finished unit is kept."""
    return f"{UNITS}/{unit:07d}.{revision}.json"


def seal_key(generation: int) -> str:
    """Where a seal is kept."""
    return f"{SEALS}/{generation:06d}.json"


def staging_prefix(name: str, attempt: str) -> str:
    """Where an attempt writes before it commits."""
    return f"{STAGING}/{name}.{attempt}"


def new_attempt() -> str:
    """A name no other attempt has."""
    return uuid.uuid4().hex[:16]


@dataclass(frozen=True, slots=True)
class Document:
    """A ledger document as it stands in storage."""

    body: dict[str, Any]
    about: dict[str, Any]

    @property
    def digest(self) -> str:
        """Digest of the body."""
        return digest(self.body)

    def to_bytes(self) -> bytes:
        """The stored form."""
        stored = {"body": self.body, "digest": self.digest, "about": self.about, "about_digest": digest(self.about)}
        return json.dumps(stored, indent=1, sort_keys=True).encode()


def parse_document(data: bytes, where: str) -> Document:
    """The document in `data`; CorruptError if its body is not what its digest says."""
    value = parse_json(data, where)
    if not isinstance(value, dict) or not {"body", "digest", "about", "about_digest"} <= value.keys():
        raise CorruptError("not a ledger document", expected="body, digest, about", where=where, remedy="Restore this object.")
    document = Document(value["body"], value["about"])
    if document.digest != value["digest"]:
        raise CorruptError("a ledger document was altered", expected=value["digest"], found=document.digest, where=where)
    if digest(document.about) != value["about_digest"]:
        raise CorruptError("a ledger document's about block was altered", expected=value["about_digest"], where=where)
    return document


def read_document(objects: Objects, key: str) -> Document:
    """The document under `key`; NotFoundError if there is none."""
    return parse_document(objects.read(key), key)


def find_document(objects: Objects, key: str) -> Document | None:
    """The document under `key`, or None."""
    try:
        return read_document(objects, key)
    except NotFoundError:
        return None


def listed_records(objects: Objects) -> Iterator[tuple[int, int]]:
    """(unit, revision) of every unit record; what else lies in their folder is none."""
    for key in objects.list(UNITS):
        if found := re.fullmatch(r"(\d{7,})\.(\d+)\.json", key.rsplit("/", 1)[1]):
            yield int(found[1]), int(found[2])


def finished_units(objects: Objects) -> set[int]:
    """Units that have a record."""
    return {unit for unit, _ in listed_records(objects)}


def newest_records(objects: Objects, num_units: int) -> list[Document | None]:
    """The newest record of each unit, or None."""
    revisions: dict[int, int] = {}
    for unit, revision in listed_records(objects):
        revisions[unit] = max(revision, revisions.get(unit, 0))
    return [read_document(objects, unit_key(unit, revisions[unit])) if unit in revisions else None for unit in range(num_units)]


def listed_seals(objects: Objects) -> list[int]:
    """Numbers of the generations that have a seal, ascending."""
    return sorted(int(found[1]) for key in objects.list(SEALS) if (found := re.fullmatch(r"(\d+)\.json", key.rsplit("/", 1)[1])))


def newest_generation(objects: Objects) -> int | None:
    """Number of the newest seal, found without listing; None where there is none."""
    if not objects.exists(seal_key(0)):
        return None
    newest = 0
    while objects.exists(seal_key(newest + 1)):
        newest += 1
    return newest


def newest_revision(objects: Objects, unit: int) -> int:
    """Number of a unit's newest record; 0 where there is none."""
    revision = 0
    while objects.exists(unit_key(unit, revision + 1)):
        revision += 1
    return revision


def newest_record(objects: Objects, unit: int) -> Document | None:
    """The newest record of a unit, or None."""
    return find_document(objects, unit_key(unit, newest_revision(objects, unit)))


def replace_document(objects: Objects, key: str, body: dict[str, Any], attempt: str) -> None:
    """Put a document in the place of a damaged one, which nobody can have relied on."""
    objects.put(key, _document(body, attempt).to_bytes())


def _document(body: dict[str, Any], attempt: str, **about: Any) -> Document:
    versions = {name: version(name) for name in ("torch", "transformers", "zarr", "numcodecs", "tokenizers")}
    facts = {"attempt": attempt, "host": socket.gethostname(), "time": time.time(), "python": platform.python_version()}
    return Document(body, {**facts, "versions": versions, **about})


def commit(objects: Objects, key: str, body: dict[str, Any], attempt: str, **about: Any) -> tuple[Document, bool]:
    """Create the document unless there is one; return the one that stands, and whether it is this attempt's.

    The record is read back after a refusal, for the answer to a create that did succeed may have been lost.
    """
    mine = _document(body, attempt, **about)
    if objects.create(key, mine.to_bytes()):
        return mine, True
    standing = read_document(objects, key)
    return standing, standing.about.get("attempt") == attempt


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """One finished unit: the shards of each array, and how many codes of each array were saturated."""

    cache_id: str
    unit: int
    revision: int
    shards: Mapping[str, tuple[ShardRecord, ...]]
    saturation: Mapping[str, float]

    def to_body(self) -> dict[str, Any]:
        """The JSON form."""
        shards = {path: [asdict(shard) for shard in records] for path, records in self.shards.items()}
        return {
            "cache_id": self.cache_id,
            "unit": self.unit,
            "revision": self.revision,
            "shards": shards,
            "saturation": dict(self.saturation),
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """The inverse of `to_body`."""
        shards = {
            path: tuple(ShardRecord(**{**r, "chunk_crc32c": tuple(r["chunk_crc32c"])}) for r in records)
            for path, records in body["shards"].items()
        }
        return cls(body["cache_id"], body["unit"], body["revision"], shards, body["saturation"])


def is_record_of(document: Document, cache_id: str, unit: int, revision: int) -> bool:
    """Whether a document is the record of this unit and revision of this cache."""
    return (document.body.get("cache_id"), document.body.get("unit"), document.body.get("revision")) == (cache_id, unit, revision)


@contextlib.contextmanager
def attempt_folder(objects: Objects, name: str) -> Iterator[tuple[str, str]]:
    """(attempt, staging prefix) of a fresh attempt; what it staged is removed when the block fails."""
    attempt = new_attempt()
    prefix = staging_prefix(name, attempt)
    try:
        yield attempt, prefix
    except BaseException:
        objects.delete_tree(prefix)
        raise


def refuse_inside_a_cache(target: Path) -> None:
    """InputError where a path is a cache's folder or below one: a cache holds nothing but itself, `repair` and `seal` remove
    strangers."""
    here = target.resolve()
    for folder in (here, *here.parents):
        if (folder / PLAN).is_file():
            raise InputError("a cache holds nothing but itself", expected="a place outside of it", found=target, where=folder)
