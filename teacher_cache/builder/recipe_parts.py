"""What of a recipe decided a plan or a calibration, as the ledger keeps it, and how it is compared with the recipe of today.

Policy: what is stored is never compared as bytes. It is completed first with the defaults of this version, so that a key that came
later, and whose default means what was done before, is no other recipe.
"""

from collections.abc import Iterator
from typing import Any

from signal_store.errors import MismatchError
from signal_store.signals import HiddenSignal, Signals
from teacher_cache.recipe import LOCAL_PLACES, CacheRecipe, CalibrationSection, Source
from teacher_cache.signals.registry import planned_positions

PLANNED_DEFAULTS: dict[str, Any] = {"replay_share": 1.0, "evidence": False, "coverage_words": None}
"""Of parts that came after the first plans."""
TAKEN_NOWHERE: dict[str, Any] = {
    "max_columns": None,
    "previous_steps": 0,
    "hidden_positions": None,
    "replay_positions": None,
    **PLANNED_DEFAULTS,
}
"""Of signals that are off."""
TAGGER_DEFAULTS: dict[str, Any] = {"keywords": False}
SOURCE_BEFORE: dict[str, Any] = {"special_tokens": "tokens"}
"""What was done before there was a key, where today's default is another."""


def source_part(source: Source) -> dict[str, Any]:
    """What of a source decides the plan, as JSON; of its tagger the parser only, the digests of its models are in the manifest."""
    part = source.model_dump(mode="json", exclude={*LOCAL_PLACES, "tagger", "on_bad_row"})
    tagger = source.tagger
    if tagger is None:
        return {**part, "tagger": None}
    kept = {"parser": tagger.parser, "semantic": tagger.semantic_model is not None, "keywords": tagger.keywords}
    return {**part, "tagger": kept}


def completed_source(part: dict[str, Any]) -> dict[str, Any]:
    """A stored `source_part`, with what it lacks."""
    whole = {**source_part(Source.model_construct(name=part["name"])), **SOURCE_BEFORE, **part}
    return whole if whole["tagger"] is None else {**whole, "tagger": {**TAGGER_DEFAULTS, **whole["tagger"]}}


def planned_part(recipe: CacheRecipe) -> dict[str, Any]:
    """What of the recipe decides the plan, as JSON: the text, and where each signal is taken. An overlay's text is its base's."""
    signals = recipe.signals
    positions = {**TAKEN_NOWHERE, **planned_positions(signals, recipe.context)}
    if recipe.base is not None:
        return {"keywords": list(signals.attention.keywords), **positions} if signals.attention else positions
    part = recipe.model_dump(mode="json", include={"context", "overlap", "append_eos"})
    part["sources"] = [source_part(source) for source in recipe.sources]
    return {**part, "unit_tokens": recipe.resolved_unit_tokens, "keywords": list(recipe.keywords), **positions}


def completed_plan(part: dict[str, Any]) -> dict[str, Any]:
    """A stored `planned_part`, with what it lacks."""
    whole = {**PLANNED_DEFAULTS, **part}
    if whole["hidden_positions"] is not None:
        positions = HiddenSignal.model_validate({"positions": whole["hidden_positions"]})
        whole["hidden_positions"] = positions.model_dump(mode="json")["positions"]
    if "signals" in whole:
        stored = Signals.model_validate({"distribution": None, **whole["signals"]})
        whole["signals"] = stored.model_dump(mode="json", include=set(whole["signals"]))
    return {**whole, "sources": [completed_source(source) for source in whole["sources"]]}


def calibrated_part(recipe: CacheRecipe, plan_digest: str) -> dict[str, Any]:
    """What decides the calibration, as JSON: the plan, and all of the recipe that the plan did not look at but the teacher's
    place and name, for which its digests speak."""
    teacher = recipe.teacher.model_dump(mode="json", include={"dtype"})
    rest = recipe.model_dump(mode="json", include={"signals", "batch_tokens", "forward", "calibration"})
    return {"plan": plan_digest, **{f"teacher.{name}": value for name, value in teacher.items()}, **rest}


def completed_calibration(part: dict[str, Any]) -> dict[str, Any]:
    """A stored `calibrated_part`, with what it lacks."""
    signals, calibration = Signals.model_validate(part["signals"]), CalibrationSection.model_validate(part["calibration"])
    return {**part, "signals": signals.model_dump(mode="json"), "calibration": calibration.model_dump(mode="json")}


def refuse_another_recipe(
    done: str, made: dict[str, Any], wanted: dict[str, Any], recipe: CacheRecipe, ignore: str | None = None
) -> None:
    """MismatchError naming the parts of the recipe that differ from what the cache was `done` (planned, calibrated) by. `made`:
    completed."""
    names = wanted.keys() if recipe.base is not None else made.keys() | wanted.keys()
    changed = sorted(key for key in names if key != ignore and made.get(key) != wanted.get(key))
    if changed:
        leaves = [leaf for key in changed for leaf in _differences(key, made.get(key), wanted.get(key))]
        raise MismatchError(
            f"the cache was {done} by another recipe ({', '.join(changed)} differ)",
            expected=", ".join(f"{place}: {a!r}" for place, a, _ in leaves),
            found=", ".join(f"{place}: {b!r}" for place, _, b in leaves),
            where=recipe.cache,
            remedy="Restore the recipe, or build into another folder"
            + ("; `teacher-cache extend` adds documents." if "sources" in changed else "."),
        )


def _differences(place: str, made: Any, wanted: Any) -> Iterator[tuple[str, Any, Any]]:
    """(place, value, other value) of every leaf that differs between two JSON values."""
    if isinstance(made, dict) and isinstance(wanted, dict):
        for key in sorted(made.keys() | wanted.keys()):
            yield from _differences(f"{place}.{key}", made.get(key), wanted.get(key))
    elif isinstance(made, list) and isinstance(wanted, list) and len(made) == len(wanted):
        for number, (a, b) in enumerate(zip(made, wanted, strict=True)):
            yield from _differences(f"{place}.{number}", a, b)
    elif isinstance(made, list) and isinstance(wanted, list) and all(isinstance(item, dict) for item in made + wanted):
        names = [[str(item.get("name")) for item in items] for items in (made, wanted)]
        yield place, names[0], names[1]
    elif made != wanted:
        yield place, made, wanted
