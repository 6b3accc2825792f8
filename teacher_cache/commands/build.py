"""build: plan, calibrate, fill and seal in one go; goes on where it stopped."""

from typing import TYPE_CHECKING

import typer

from run_kit.recipe_file import load_recipe
from teacher_cache.options import AsJson, Overrides, ProcessesOption, RecipeArgument, say, worker_of
from teacher_cache.recipe import CacheRecipe
from teacher_cache.worker import ALONE, Worker

if TYPE_CHECKING:
    from signal_store.cache import Cache


def build(recipe: CacheRecipe, worker: Worker = ALONE) -> "Cache":
    """The sealed cache of a recipe. A cache that is sealed already is opened, without loading the teacher."""
    from signal_store.ledger.documents import finished_units, newest_generation
    from teacher_cache.builder.fill import fill_units
    from teacher_cache.builder.seal import seal_cache
    from teacher_cache.builder.session import BuildSession

    session = BuildSession.of(recipe, worker)
    objects = session.objects
    was_sealed = newest_generation(objects) is not None
    if not was_sealed:
        session.refuse_absent_device()
    session = session.planned()
    if was_sealed and len(finished_units(objects)) >= session.plan.num_units:
        session.refuse_another_calibration()
    else:
        session.refuse_another_tokenizer()
        fill_units(session.calibrated, objects, worker)
    seal_cache(objects)
    return session.open()


def command(
    recipe: RecipeArgument, overrides: Overrides = None, processes: ProcessesOption = None, as_json: AsJson = False
) -> None:
    """Plan, calibrate, fill and seal; go on where it stopped."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from signal_store.io.objects import objects_at
    from teacher_cache.builder.status import find_status

    before = find_status(objects_at(loaded.cache))
    cache = build(loaded, worker_of(None, processes))
    if before is not None and before.stage == "sealed":
        typer.echo("sealed before: no text was read, nothing was computed. New text is for extend, damage for repair.", err=True)
    say(
        {"cache": cache.uri, "cache_id": cache.manifest.cache_id, "segments": len(cache), "units": cache.seal.num_units},
        as_json,
    )
