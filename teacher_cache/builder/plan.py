"""A plan that was committed, with the extensions that followed it."""

from dataclasses import dataclass
from typing import Any

from signal_store.canonical import digest
from signal_store.format.capacities import Capacities
from signal_store.io.objects import Objects
from signal_store.ledger.documents import PLAN, Document, extension_key, find_document, plan_unit_key, read_document
from signal_store.manifest import SourceIdentity
from teacher_cache.corpus.unit_plan import UnitPlan


@dataclass(frozen=True, slots=True)
class Plan:
    """A committed plan and its extensions, oldest first."""

    document: Document
    extensions: tuple[Document, ...] = ()

    @property
    def digest(self) -> str:
        """Identity of the plan; extensions do not change it."""
        return self.document.digest

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer: rows of the distribution."""
        return int(self.document.body["tokenizer"]["vocab_size"])

    @property
    def text_digest(self) -> str:
        """Identity of its tokens and segments alone: overlays share it."""
        recipe = self.document.body["recipe"]
        units = [unit["digest"] for unit in self.document.body["units"]]
        parts = {"tokenizer": self.document.body["tokenizer"]["digest"], "unit_tokens": recipe["unit_tokens"], "units": units}
        return digest(parts)

    @property
    def units(self) -> list[dict[str, Any]]:
        """Of all generations: digest, split, segments, tokens."""
        return [unit for document in (self.document, *self.extensions) for unit in document.body["units"]]

    @property
    def num_units(self) -> int:
        """How many units there are to fill."""
        return len(self.units)

    @property
    def sources(self) -> tuple[SourceIdentity, ...]:
        """What was read, in all generations."""
        found = [source for document in (self.document, *self.extensions) for source in document.body["sources"]]
        return tuple(SourceIdentity.model_validate(s) for s in found)

    def identities_of(self, source: str) -> list[SourceIdentity]:
        """What was read of one source, generation by generation."""
        return [identity for identity in self.sources if identity.name == source]

    @property
    def has_tags(self) -> bool:
        """Whether the units hold the roles of words; an overlay's are its base's."""
        first = [SourceIdentity.model_validate(source) for source in self.document.body["sources"]]
        return self.document.body["base"] is None and any(source.tagger is not None for source in first)

    @property
    def capacities(self) -> Capacities:
        """Rows each unit has room for."""
        return Capacities.model_validate(self.document.body["capacities"])

    def at_generation(self, extensions: int) -> "Plan":
        """The plan as it was when it had this many extensions."""
        return Plan(self.document, self.extensions[:extensions])

    @property
    def recipe(self) -> dict[str, Any]:
        """The part of the recipe that decided it (`planned_part`)."""
        part: dict[str, Any] = self.document.body["recipe"]
        return part

    def spread_units(self, limit: int) -> list[int]:
        """At most `limit` units, spread evenly."""
        return sorted({round(i * (self.num_units - 1) / max(1, limit - 1)) for i in range(limit)})

    def unit(self, objects: Objects, unit: int) -> UnitPlan:
        """The plan of one unit."""
        content = self.units[unit]["digest"]
        key = plan_unit_key(unit, content)
        return UnitPlan.from_bytes(objects.read(key), content, key)


def read_plan(objects: Objects) -> Plan:
    """The plan that stands, with all its extensions; NotFoundError if there is none."""
    document = read_document(objects, PLAN)
    extensions: list[Document] = []
    while (found := find_document(objects, extension_key(len(extensions) + 1))) is not None:
        extensions.append(found)
    return Plan(document, tuple(extensions))
