"""The signals of a cache: what of the teacher is written down. A recipe's section, and part of a cache's identity.

One file a signal. Those of this package are fields of `Signals`; another one is a file more in this folder, found by its name.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from pydantic import create_model, model_validator

from signal_store.format.section import Section
from signal_store.signals.attention import DEFAULT_KEYWORDS, AttentionLayout, AttentionSignal
from signal_store.signals.base import Dimensions, Meaning, Signal
from signal_store.signals.coverage import MOST_COVERAGE_WORDS, CoverageSignal
from signal_store.signals.distribution import HEAD_SIZES, QUALITIES, DistributionSignal, Quality
from signal_store.signals.evidence import EvidenceSignal
from signal_store.signals.hidden import (
    EveryNth,
    HiddenLayout,
    HiddenSignal,
    Positions,
    RandomFraction,
    Stratified,
    Tap,
)
from signal_store.signals.replay import ReplaySignal
from signal_store.signals.stats import StatsLayout, StatsSignal
from signal_store.signals.tags import TagsSignal


class ShippedSignals(Section):
    """Which signals are cached; a signal left out is not."""

    distribution: DistributionSignal | None = DistributionSignal.model_validate({})
    hidden: HiddenSignal | None = None
    attention: AttentionSignal | None = None
    stats: StatsSignal | None = None
    replay: ReplaySignal | None = None
    evidence: EvidenceSignal | None = None
    coverage: CoverageSignal | None = None

    if TYPE_CHECKING:  # a signal that is one file more

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not list(self.cached()):
            raise ValueError("every signal is off: nothing would be stored")
        return self

    def cached(self) -> Iterator[tuple[str, Signal]]:
        """Name and section of each signal that is cached, in the order of the fields."""
        return ((name, signal) for name, signal in self if isinstance(signal, Signal))


def _further() -> dict[str, Any]:
    """By name, the field of each signal of this folder that `ShippedSignals` does not have."""
    shipped = {*ShippedSignals.model_fields, "base", "tags"}
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name not in shipped:
            kinds = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
            own = [k for k in kinds if isinstance(k, type) and issubclass(k, Signal) and k.name() == module.name]
            if len(own) != 1:
                raise TypeError(f"signals/{module.name}.py must have one class of Signal, and has {len(own)}")
            found[module.name] = (own[0] | None, None)
    return found


if TYPE_CHECKING:
    Signals = ShippedSignals
else:
    Signals = create_model("Signals", __base__=ShippedSignals, __module__=__name__, __doc__=ShippedSignals.__doc__, **_further())


def meaning(path: str) -> tuple[str, str] | None:
    """(what it is, unit) of an array of a signal; None of one that no signal of this version has."""
    kinds: list[type[Signal]] = [TagsSignal, *(_kind(field.annotation) for field in Signals.model_fields.values())]
    for kind in kinds:
        for pattern, what, unit in kind.meanings:
            if re.fullmatch(pattern, path):
                return what, unit
    return None


def _kind(annotation: Any) -> type[Signal]:
    (kind,) = (k for k in annotation.__args__ if isinstance(k, type) and issubclass(k, Signal))
    found: type[Signal] = kind
    return found


__all__ = [
    "DEFAULT_KEYWORDS",
    "HEAD_SIZES",
    "MOST_COVERAGE_WORDS",
    "QUALITIES",
    "AttentionLayout",
    "AttentionSignal",
    "CoverageSignal",
    "Dimensions",
    "DistributionSignal",
    "EveryNth",
    "EvidenceSignal",
    "HiddenLayout",
    "HiddenSignal",
    "Meaning",
    "Positions",
    "Quality",
    "RandomFraction",
    "ReplaySignal",
    "ShippedSignals",
    "Signal",
    "Signals",
    "StatsLayout",
    "StatsSignal",
    "Stratified",
    "TagsSignal",
    "Tap",
    "meaning",
]
