"""A teacher with a calibrated cache: what each signal reads of it, and works with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from signal_store.manifest import Manifest
from teacher_cache.signals.base import Arrays, Facts
from teacher_cache.signals.registry import Extractors, extractors_of
from teacher_cache.teacher.forward import TapRequest
from teacher_cache.teacher.load import Teacher


@dataclass(frozen=True)
class CalibratedTeacher:
    """The frozen manifest, the matrices it speaks of, and the teacher that made or matched them."""

    manifest: Manifest
    arrays: Arrays
    teacher: Teacher

    @cached_property
    def extractors(self) -> Extractors:
        """Of all signals that the cache holds."""
        tags = any(spec.path == "tags/roles" for spec in self.manifest.specs)
        return extractors_of(self.manifest.signals, self.manifest.plan.context, tags=tags)

    @cached_property
    def facts(self) -> dict[str, Facts]:
        """By signal, what calibration decided."""
        document = self.manifest.calibration.model_dump(mode="json")
        return {extractor.name: extractor.facts_of(document) for extractor in self.extractors}

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """By signal, what its extractor works with."""
        return {e.name: e.prepare(self.facts[e.name], self.manifest, self.arrays, self.teacher) for e in self.extractors}

    @cached_property
    def tap_request(self) -> TapRequest:
        """What of the teacher is read while it runs."""
        return taps_of(self.extractors, self.facts, self.teacher)


def taps_of(extractors: Extractors, facts: Mapping[str, Facts], teacher: Teacher) -> TapRequest:
    """All that the signals read."""
    return joined(extractor.taps(facts[extractor.name], teacher) for extractor in extractors)


def joined(parts: Iterable[TapRequest]) -> TapRequest:
    """All of them as one, nothing twice."""
    some = list(parts)
    return TapRequest(
        tuple(dict.fromkeys(state for part in some for state in part.states)),
        tuple(dict.fromkeys(layer for part in some for layer in part.row_layers)),
        tuple(dict.fromkeys(layer for part in some for layer in part.gradient_layers)),
    )
