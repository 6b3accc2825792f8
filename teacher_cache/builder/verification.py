"""Every object of a sealed cache, read anew and held against the catalogue; and what lies among them and does not belong.

Nothing of the reader is trusted here: every byte of every shard, constant, zarr.json and ledger document is hashed.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from run_kit.progress import progress_bar
from signal_store.canonical import digest, sha256
from signal_store.errors import NotFoundError, StorageError
from signal_store.io.objects import Objects, join_uri
from signal_store.ledger.catalogue import catalogue
from signal_store.ledger.documents import (
    CLAIMS,
    MANIFEST,
    PLAN,
    STAGING,
    UNITS,
    WORKERS,
    UnitRecord,
    newest_generation,
    seal_key,
)
from signal_store.ledger.entries import Entry, Ledger, Origin
from signal_store.signals import Signals

OWN_FOLDERS = frozenset(("ledger", "units", "calibration", "tokens", "segments", *Signals.model_fields, "tags"))
STRANGER = "does not belong to the cache"


@dataclass(frozen=True, slots=True)
class Damage:
    """An object that is not what was committed. `unit`: whose it is, None for what no unit owns."""

    key: str
    what: str
    unit: int | None = None

    @property
    def is_stranger(self) -> bool:
        """Whether it is an object that nobody committed."""
        return self.what == STRANGER


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found, of how many objects and bytes."""

    damages: tuple[Damage, ...]
    num_objects: int
    num_bytes: int
    listed: bool
    """Whether the store could be listed, so that objects that do not belong were looked for."""


def check_objects(objects: Objects) -> Verified:
    """Check the newest generation of a sealed cache; NotFoundError or CorruptError where not even manifest and seal can be read."""
    newest = newest_generation(objects)
    if newest is None and not objects.exists(PLAN):
        raise NotFoundError("no cache here", expected="one made by teacher-cache", found=objects.uri)
    if newest is None:
        where = join_uri(objects.uri, seal_key(0))
        raise NotFoundError("the cache is not sealed", where=where, remedy="Run teacher-cache build to finish it, or repair.")
    ledger = Ledger(objects, range(newest + 1))
    for key in (MANIFEST, seal_key(newest)):  # without these nothing says what the others are
        ledger.require(key)
    damages: list[Damage] = []
    entries = list(catalogue(ledger))
    with progress_bar() as progress:
        bar = progress.add_task("verify", total=len(entries), unit="objects")
        for entry in entries:
            if (what := ledger.fault(entry)) is not None:
                damages.append(Damage(entry.key, what, entry.unit))
            progress.advance(bar)
    damages += _other_content(ledger, entries)
    listed = strangers(objects, (entry.key for entry in entries))
    damages += [Damage(key, STRANGER) for key in listed or ()]
    return Verified(tuple(damages), len(entries), ledger.num_bytes, listed is not None)


def _other_content(ledger: Ledger, entries: Iterable[Entry]) -> list[Damage]:
    """Whether records that are each whole are not those that were sealed together."""
    seal = ledger.seals[max(ledger.seals)]
    newest = {entry.unit: entry for entry in entries if entry.origin is Origin.RECORD and (entry.unit or 0) < seal.num_units}
    documents = [ledger.whole(entry.key) for entry in newest.values() if ledger.fault(entry) is None]
    records = [UnitRecord.from_body(document.body).to_body() for document in documents if document is not None]
    if len(records) != seal.num_units or digest(records) == seal.content_digest:
        return []
    return [Damage(UNITS, "the records are not those that were sealed")]


def strangers(objects: Objects, belonging: Iterable[str]) -> Sequence[str] | None:
    """Objects in the cache's own folders that do not belong; None where the place cannot be listed. What workers leave in staging,
    claims and notes is inert, and so are whole plans and calibrations of attempts that lost; files beside the cache's own folders
    are none of its business."""
    try:
        keys = objects.list("")
    except StorageError:
        return None
    known = set(belonging)
    return [key for key in keys if key not in known and is_own(key) and not _is_inert(objects, key)]


def is_own(key: str) -> bool:
    """Whether a key lies where a cache puts its objects."""
    return key == "zarr.json" or key.split("/")[0] in OWN_FOLDERS


def _is_inert(objects: Objects, key: str) -> bool:
    if key.startswith((f"{STAGING}/", f"{CLAIMS}/", f"{WORKERS}/")):
        return True
    named = re.fullmatch(r"ledger/(?:plan/\d{7}\.([0-9a-f]{16})|calibration/([0-9a-f]{16})(?:\.copy)?\.safetensors)", key)
    return named is not None and sha256(objects.read(key)).removeprefix("sha256:").startswith(named[1] or named[2])
