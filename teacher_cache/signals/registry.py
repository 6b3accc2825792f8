"""The extractors of a recipe's signals, each found by its signal's name; and what all of them say together of a plan."""

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from signal_store.errors import InputError
from signal_store.format.capacities import Capacities
from signal_store.signals import Signals, TagsSignal
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.base import SignalExtractor

Extractors = tuple[SignalExtractor[Any, Any], ...]


@functools.cache
def extractor_class(name: str) -> type[SignalExtractor[Any, Any]]:
    """The one class of `SignalExtractor` in `teacher_cache/signals/<name>.py`; InputError where there is no such file."""
    module = f"{__package__}.{name}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise InputError(
            f"nothing says how the signal {name} is taken from a teacher",
            expected=f"{module.replace('.', '/')}.py with a class of SignalExtractor",
            found="no such file",
            where=f"signals.{name}",
        ) from error
    kinds = [k for k in vars(found).values() if isinstance(k, type) and issubclass(k, SignalExtractor) and k.__module__ == module]
    if len(kinds) != 1:
        raise TypeError(f"{module} must have one class of SignalExtractor, and has {len(kinds)}")
    return kinds[0]


def extractors_of(signals: Signals, context: int, *, tags: bool = False) -> Extractors:
    """Of the signals that are cached, in the order of the recipe's fields, after the roles of words where there are any."""
    cached = [*([("tags", TagsSignal())] if tags else []), *signals.cached()]
    return tuple(extractor_class(name)(section, context) for name, section in cached)


def capacities_of(unit: UnitPlan, signals: Signals, context: int) -> Capacities:
    """Rows this unit needs."""
    rows = {name: n for extractor in extractors_of(signals, context) for name, n in extractor.capacities(unit).items()}
    return Capacities(segments=len(unit.length), **rows)


def planned_positions(signals: Signals, context: int) -> dict[str, Any]:
    """What of the signals decides where they are taken, as a plan's document keeps it."""
    return merged(extractor.planned() for extractor in extractors_of(signals, context))


def refuse_empty_signals(signals: Signals, context: int, needs: Capacities) -> None:
    """InputError naming a signal that the plan gives nothing to be taken at."""
    for extractor in extractors_of(signals, context):
        extractor.refuse_empty(needs)


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All parts as one; what they keep under `signals` is side by side there."""
    whole: dict[str, Any] = {}
    for part in parts:
        both = {"signals": {**whole["signals"], **part["signals"]}} if "signals" in whole and "signals" in part else {}
        whole |= {**part, **both}
    return whole
