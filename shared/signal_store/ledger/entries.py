"""An object of a cache, as the ledger speaks of it; and the ledger, which says whether an object is what was committed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from signal_store.canonical import sha256
from signal_store.errors import CorruptError, NotFoundError
from signal_store.io.objects import Objects
from signal_store.ledger.documents import MANIFEST, PLAN, Document, extension_key, parse_document, seal_key
from signal_store.ledger.seal import Seal
from signal_store.manifest import Manifest, SourceIdentity, parse_manifest


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
        while (document := self.whole(extension_key(len(found)) if found else PLAN)) is not None:
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
