"""What a cache consists of: of every object its key, the digest that it must have, the unit that owns it, and what it can be made
again from.

Documents name the others: the newest seal names the manifest, the seal before it, plan, extensions, calibration, tokenizer,
constants and metadata; plans name their units, records their shards. What hangs on a document that is damaged is listed without a
digest where its key is known all the same, else not at all. `verify` reads every entry, `repair` makes again what fails, section by
section, and what a place holds beside the entries is a stranger.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain
from typing import Any

from signal_store.canonical import sha256
from signal_store.errors import CorruptError, NotFoundError
from signal_store.format.arrays import ArraySpec
from signal_store.format.manifest import Manifest, SourceIdentity, parse_manifest
from signal_store.io.objects import Objects
from signal_store.ledger.documents import (
    CALIBRATION,
    MANIFEST,
    PLAN,
    Document,
    UnitRecord,
    calibration_keys,
    extension_key,
    newest_revision,
    parse_document,
    plan_unit_key,
    seal_key,
    tokenizer_key,
    unit_key,
)
from signal_store.ledger.seal import Seal


class Origin(Enum):
    """What an object is made again from."""

    TEXTS = auto()
    """The texts, cut again as the recipe says; an overlay's from its base."""
    TOKENIZER = auto()
    """The recipe's tokenizer."""
    CALIBRATION = auto()
    """The teacher, on a few thousand tokens of the plan; a copy from the other copy."""
    MANIFEST = auto()
    """Recipe, plan and calibration."""
    RECORD = auto()
    """The teacher, over the unit."""
    SHARD = auto()
    """The same, under the record that stands."""
    SEAL = auto()
    """Manifest, plan and records."""
    CONSTANT = auto()
    """What the seal is made from."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An object of a cache. `digest`: a document's is its body's, any other's that of its bytes; None where nothing whole says it.
    `says`: what a document's body must say. `unit`: whose it is, None for what no unit owns."""

    key: str
    origin: Origin
    digest: str | None = None
    unit: int | None = None
    is_document: bool = False
    says: Mapping[str, Any] = field(default_factory=dict)


class Ledger:
    """The documents of a cache, each read once if it is whole. `generations`: numbers of its seals, ascending."""

    def __init__(self, objects: Objects, generations: Sequence[int]) -> None:
        self.objects, self.generations = objects, generations
        self.num_bytes = 0
        """Of all objects that were read, each once."""
        self._read: set[str] = set()
        self._whole: dict[str, Document] = {}

    def require(self, key: str) -> Document:
        """The document; NotFoundError if it is gone, CorruptError if it is not whole to the byte, its `about` too."""
        if key not in self._whole:
            data = self._bytes(key)
            document = parse_document(data, key)
            if document.to_bytes() != data:
                raise CorruptError("a ledger document is not as it was written", where=key)
            self._whole[key] = document
        return self._whole[key]

    def whole(self, key: str) -> Document | None:
        """The same, None where that is damaged. A store that fails to answer is no damage: it raises."""
        return None if isinstance(found := self._document(key), str) else found

    def fault(self, entry: Entry) -> str | None:
        """What is wrong with an object; None where it is what was committed, or nothing says what that was."""
        if entry.is_document:
            found = self._document(entry.key)
            if isinstance(found, str):
                return found
            if entry.digest is not None and found.digest != entry.digest:
                return "not the document that was sealed"
            other = any(found.body.get(name) != value for name, value in entry.says.items())
            return "the document of another unit or cache" if other else None
        if entry.digest is None:
            return None
        try:
            return None if sha256(self._bytes(entry.key)) == entry.digest else "altered"
        except NotFoundError:
            return "gone"

    def forget(self, key: str) -> None:
        """Read a document anew when it is next asked for: another stands there now."""
        self._whole.pop(key, None)

    def failing(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that are not what was committed."""
        return [entry for entry in entries if self.fault(entry) is not None]

    def _bytes(self, key: str) -> bytes:
        data = self.objects.read(key)
        self.num_bytes += 0 if key in self._read else len(data)
        self._read.add(key)
        return data

    def _document(self, key: str) -> Document | str:
        """The document, or what is wrong with it."""
        try:
            return self.require(key)
        except NotFoundError:
            return "gone"
        except CorruptError as error:
            return error.what

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, if it is whole."""
        frozen = self.whole(MANIFEST)
        return None if frozen is None else parse_manifest(frozen.body, MANIFEST)

    @property
    def seals(self) -> dict[int, Seal]:
        """The seals that are whole, by generation."""
        found = {number: self.whole(seal_key(number)) for number in self.generations}
        return {number: Seal.from_body(document.body) for number, document in found.items() if document is not None}

    @property
    def plans(self) -> list[Document]:
        """The plan and its extensions, up to the first that is not whole."""
        found: list[Document] = []
        for entry in plan_entries(self):
            if (document := self.whole(entry.key)) is None:
                break
            found.append(document)
        return found

    @property
    def num_extensions(self) -> int:
        """Extensions that were sealed."""
        return max((sealed.num_extensions for sealed in self.seals.values()), default=0)

    @property
    def num_sealed_units(self) -> int:
        """Units that must have a record: those of the newest seal; of a cache that has none, all of its first plan."""
        first = self.whole(PLAN)
        planned = 0 if first is None else len(first.body["units"])
        return max((sealed.num_units for sealed in self.seals.values()), default=planned)

    def digest_of(self, key: str) -> str | None:
        """The digest that a document must have, if a seal or the manifest says it."""
        seals = self.seals
        if key == MANIFEST:
            return next((sealed.cache_id for sealed in seals.values()), None)
        if key == PLAN and (manifest := self.manifest) is not None:
            return manifest.plan.digest
        return next((sealed.ledger[key] for sealed in seals.values() if key in sealed.ledger), None)

    def sources_of(self, extension: int) -> Sequence[SourceIdentity] | None:
        """The sources that an extension added, if seals before and after it are whole."""
        counts = {sealed.num_extensions: sealed.added_sources for sealed in self.seals.values()} | {0: ()}
        if extension not in counts or extension - 1 not in counts:
            return None
        return counts[extension][len(counts[extension - 1]) :]


def plan_entries(ledger: Ledger) -> Iterator[Entry]:
    """The plan, and its extensions, sealed or not."""
    number, sealed = 0, ledger.num_extensions
    while number <= sealed or ledger.objects.exists(extension_key(number)):
        yield plan_entry(ledger, number)
        number += 1


def plan_entry(ledger: Ledger, extension: int) -> Entry:
    """The plan (0), or an extension of it."""
    key = extension_key(extension) if extension else PLAN
    return Entry(key, Origin.TEXTS, ledger.digest_of(key), is_document=True)


def planned_unit_entries(plan: Document, first: int) -> Iterator[Entry]:
    """The plans of the units of a plan or an extension, of which `first` is the number of the first."""
    for number, unit in enumerate(plan.body["units"], start=first):
        yield Entry(plan_unit_key(number, unit["digest"]), Origin.TEXTS, unit["digest"])


def text_entries(ledger: Ledger) -> Iterator[Entry]:
    """The plan, its extensions, and the plans of their units."""
    yield from plan_entries(ledger)
    first = 0
    for document in ledger.plans:
        yield from planned_unit_entries(document, first)
        first += len(document.body["units"])


def tokenizer_entries(ledger: Ledger) -> Iterator[Entry]:
    """The files of the tokenizer, as the newest seal names them, or the plan."""
    seals, plan = ledger.seals, ledger.whole(PLAN)
    planned = {} if plan is None else plan.body["tokenizer"]["files"]
    files: Mapping[str, str] = seals[max(seals)].tokenizer if seals else planned
    for name, content in files.items():
        yield Entry(tokenizer_key(name), Origin.TOKENIZER, content)


def calibration_entries(ledger: Ledger) -> Iterator[Entry]:
    """The calibration, and both copies of its matrices."""
    yield Entry(CALIBRATION, Origin.CALIBRATION, ledger.digest_of(CALIBRATION), is_document=True)
    manifest, document = ledger.manifest, ledger.whole(CALIBRATION)
    named: str | None = None if document is None else document.body["arrays_digest"]
    arrays = named if manifest is None else manifest.calibration.digest
    for key in () if arrays is None else calibration_keys(arrays):
        yield Entry(key, Origin.CALIBRATION, arrays)


def manifest_entries(ledger: Ledger) -> Iterator[Entry]:
    """The manifest."""
    yield Entry(MANIFEST, Origin.MANIFEST, ledger.digest_of(MANIFEST), is_document=True)


def unit_entries(ledger: Ledger) -> Iterator[Entry]:
    """Of each unit the newest record, which a sealed one must have, its older records that are there, and its shards. Those of a
    unit that is not sealed, or whose record is damaged, belong to the cache, published or not, and nothing says what they are."""
    manifest, sealed = ledger.manifest, ledger.num_sealed_units
    for unit in range(max(sealed, sum(len(plan.body["units"]) for plan in ledger.plans))):
        newest = newest_revision(ledger.objects, unit)
        record = Entry("", Origin.RECORD)
        for revision in range(newest + 1):
            key = unit_key(unit, revision)
            says = {} if manifest is None else {"cache_id": manifest.cache_id, "unit": unit, "revision": revision}
            record = Entry(key, Origin.RECORD, unit=unit, is_document=True, says=says)
            if (revision == newest and unit < sealed) or ledger.objects.exists(key):
                yield record
        if manifest is not None:
            document = ledger.whole(record.key) if unit < sealed and ledger.fault(record) is None else None
            yield from _shard_entries(manifest, unit, document)


def _shard_entries(manifest: Manifest, unit: int, record: Document | None) -> Iterator[Entry]:
    shards = None if record is None else UnitRecord.from_body(record.body).shards
    for spec in manifest.specs:
        keys = shard_keys(spec, unit)
        digests = [None] * len(keys) if shards is None else [shard.sha256 for shard in shards[spec.path]]
        for key, content in zip(keys, digests, strict=True):
            yield Entry(key, Origin.SHARD, content, unit)


def shard_keys(spec: ArraySpec, unit: int) -> list[str]:
    """Where the shards of a unit's array lie."""
    return [spec.shard_key(unit * spec.shards_per_unit + shard) for shard in range(spec.shards_per_unit)]


def seal_entries(ledger: Ledger) -> Iterator[Entry]:
    """The seal of every generation; each is named by the one after it."""
    seals, manifest = ledger.seals, ledger.manifest
    says = {} if manifest is None else {"cache_id": manifest.cache_id}
    for number in range(max(ledger.generations, default=-1) + 1):
        after = seals.get(number + 1)
        yield Entry(seal_key(number), Origin.SEAL, None if after is None else after.parent, is_document=True, says=says)


def constant_entries(ledger: Ledger) -> Iterator[Entry]:
    """Objects that no unit owns, of all generations whose seals are whole: packed records, calibrated arrays, metadata."""
    expected: dict[str, str] = {}  # a generation replaces the metadata that it shares with the one before
    for _, sealed in sorted(ledger.seals.items()):
        expected |= {**sealed.constants, **sealed.metadata}
    for key, content in expected.items():
        yield Entry(key, Origin.CONSTANT, content)


SECTIONS: Sequence[Callable[[Ledger], Iterator[Entry]]] = (
    manifest_entries,
    seal_entries,
    text_entries,
    calibration_entries,
    tokenizer_entries,
    constant_entries,
    unit_entries,
)


def catalogue(ledger: Ledger) -> Iterator[Entry]:
    """All that the cache consists of."""
    return chain.from_iterable(section(ledger) for section in SECTIONS)
