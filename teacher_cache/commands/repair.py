"""repair: make a damaged cache whole again. What no unit owns follows from recipe and records; damaged units are computed anew.

Where a unit comes out otherwise than it was recorded, the cache gets a new generation: an older one that was opened keeps what it
had of whole units. An extension that is being made is left as it is.
"""

from dataclasses import dataclass

from run_kit.recipe_file import load_recipe
from signal_store.errors import CorruptError, NotFoundError
from teacher_cache.options import AsJson, Overrides, RecipeArgument, say
from teacher_cache.recipe import CacheRecipe


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was repaired: objects that are what they were, units that were computed again, of these the ones that came out otherwise
    and got a new revision, and strangers in the cache's own folders that were removed."""

    restored: tuple[str, ...]
    computed_units: tuple[int, ...]
    revised_units: tuple[int, ...]
    removed: tuple[str, ...]


def repair(recipe: CacheRecipe) -> Repaired:
    """Mend the cache of a recipe; CorruptError or MismatchError, and nothing is removed, if it cannot be."""
    from signal_store.ledger.documents import PLAN, listed_records, listed_seals
    from signal_store.ledger.entries import Ledger
    from teacher_cache.builder.repair_calibration import repair_calibration
    from teacher_cache.builder.repair_seals import repair_constants, repair_seals, seal_if_complete
    from teacher_cache.builder.repair_texts import repair_texts
    from teacher_cache.builder.repair_units import repair_records, repair_shards
    from teacher_cache.builder.session import BuildSession
    from teacher_cache.builder.verification import check_objects

    session = BuildSession.of(recipe)
    objects = session.objects
    ledger = Ledger(objects, listed_seals(objects))
    if not ledger.seals and not objects.exists(PLAN) and not any(listed_records(objects)):
        raise NotFoundError("no cache here", expected="one to repair", where=objects.uri, remedy="teacher-cache build makes one.")
    restored = repair_texts(session, ledger) + repair_calibration(session, ledger)
    session.refuse_another_calibration()
    records = repair_records(session, ledger)
    restored += [*records.keys, *repair_seals(session, ledger)]
    shards = repair_shards(session, ledger)
    seal_if_complete(session)
    restored += [*shards.keys, *repair_constants(session)]
    found = check_objects(objects)
    removed = tuple(damage.key for damage in found.damages if damage.is_stranger)
    if left := [damage for damage in found.damages if not damage.is_stranger]:
        raise CorruptError(
            "the cache cannot be repaired",
            expected="what was committed",
            found=f"{len(left)} damaged objects",
            where=left[0].key,
            remedy="Build it anew in another folder.",
        )
    for key in removed:
        objects.delete(key)
    computed = tuple(sorted({*records.computed, *shards.computed}))
    revised = tuple(sorted({*records.revised, *shards.revised}))
    return Repaired(tuple(dict.fromkeys(restored)), computed, revised, removed)


def command(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Repair what `verify` finds: compute damaged units anew, restore the rest."""
    done = repair(load_recipe(recipe, overrides or [], CacheRecipe))
    facts: dict[str, object] = {
        "restored": len(done.restored),
        "computed_units": list(done.computed_units),
        "revised_units": list(done.revised_units),
        "removed": len(done.removed),
    }
    say(facts, as_json)
