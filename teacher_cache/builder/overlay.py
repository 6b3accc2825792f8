"""An overlay stands on another cache's plan: same units, same tokens, its own signals."""

from typing import Any

from run_kit.progress import progress_bar
from signal_store.errors import InputError, MismatchError
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import MANIFEST, find_document, plan_unit_key, tokenizer_key
from signal_store.manifest import parse_manifest
from signal_store.signals import Signals
from teacher_cache.builder.plan import Plan, read_plan
from teacher_cache.builder.recipe_parts import planned_part
from teacher_cache.builder.unit_staging import NO_ROOM
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.registry import capacities_of, refuse_empty_signals


def overlay_body(recipe: CacheRecipe, objects: Objects) -> dict[str, Any]:
    """The body of an overlay's plan: its base's, copied; only the room for its own signals is this cache's."""
    assert recipe.base is not None
    below = objects_at(recipe.base)
    base = read_plan(below)
    _refuse_base(recipe.signals, base, below)
    needs = NO_ROOM
    with progress_bar() as progress:
        bar = progress.add_task("plan", total=base.num_units, unit="units")
        for number, unit in enumerate(base.units):
            data = below.read(plan_unit_key(number, unit["digest"]))
            planned_unit = UnitPlan.from_bytes(data, unit["digest"], recipe.base)
            needs = needs.union(capacities_of(planned_unit, recipe.signals, recipe.context))
            objects.put(plan_unit_key(number, unit["digest"]), data)
            progress.advance(bar)
    refuse_empty_signals(recipe.signals, recipe.context, needs)
    for name in base.document.body["tokenizer"]["files"]:
        objects.put(tokenizer_key(name), below.read(tokenizer_key(name)))
    return {
        **base.document.body,
        "recipe": {**base.recipe, **planned_part(recipe)},
        "base": base.digest,
        "capacities": needs.model_dump(mode="json"),
    }


def _refuse_base(signals: Signals, base: Plan, below: Objects) -> None:
    """What could only be refused when the overlay is opened, after all its work."""
    if base.document.body["base"] is not None:
        raise InputError("an overlay stands on a cache with text", expected="a base that is no overlay", found=below.uri)
    if base.extensions:
        raise InputError(
            "an overlay stands on a cache that was not extended", found=f"{len(base.extensions)} extensions", where=below.uri
        )
    frozen = find_document(below, MANIFEST)
    if frozen is not None:
        held = {name for name, signal in parse_manifest(frozen.body, MANIFEST).signals if signal is not None}
        twice = sorted(held & {name for name, signal in signals if signal is not None})
        if twice:
            raise InputError("the base holds this signal", expected="others", found=", ".join(twice), where=below.uri)
    attention = signals.attention
    if attention is not None and list(attention.keywords) != base.recipe["keywords"]:
        raise MismatchError(
            "an overlay has its base's keywords",
            expected=base.recipe["keywords"],
            found=list(attention.keywords),
            where="signals.attention",
        )
