"""What a cache consists of: of every object its key, the digest that it must have, the unit that owns it, and what it can be made
again from.

Documents name the others: the newest seal names the manifest, the seal before it, plan, extensions, calibration, tokenizer,
constants and metadata; plans name their units, records their shards. What hangs on a document that is damaged is listed without a
digest where its key is known all the same, else not at all. `verify` reads every entry, `repair` makes again what fails, section by
section, and what a place holds beside the entries is a stranger.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from signal_store.format.arrays import ArraySpec
from signal_store.ledger.documents import (
    CALIBRATION,
    MANIFEST,
    PLAN,
    Document,
    UnitRecord,
    calibration_keys,
    extension_key,
    newest_revision,
    plan_unit_key,
    seal_key,
    tokenizer_key,
    unit_key,
)
from signal_store.ledger.entries import Entry, Ledger, Origin
from signal_store.manifest import Manifest


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
