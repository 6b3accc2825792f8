"""extend: append new documents to a sealed cache as new units. The cache id stays; readers of an older generation never notice.

New are sources that the recipe names beside the old ones, and documents at the end of an old source. Recipe and teacher are checked
before anything is committed; then the extension's plan, its units, the metadata that shows them, the next seal. An extension that
was begun is finished first, and only by a recipe that holds its documents.
"""

from typing import TYPE_CHECKING

from run_kit.recipe_file import load_recipe
from signal_store.errors import IncompleteError, InputError
from teacher_cache.options import AsJson, Overrides, ProcessesOption, RecipeArgument, WorkerOption, say, worker_of
from teacher_cache.recipe import CacheRecipe
from teacher_cache.worker import ALONE, Worker

if TYPE_CHECKING:
    from signal_store.cache import Cache


def extend(recipe: CacheRecipe, worker: Worker = ALONE) -> "Cache":
    """Plan what is new, fill it, and seal the next generation. Goes on where it stopped."""
    from signal_store.ledger.documents import newest_generation, read_document, seal_key
    from teacher_cache.builder.extension import next_extension, plan_extension, refuse_other_texts
    from teacher_cache.builder.fill import fill_units
    from teacher_cache.builder.planned_texts import new_texts
    from teacher_cache.builder.seal import seal_cache
    from teacher_cache.builder.session import BuildSession

    if recipe.base is not None:
        raise InputError("an overlay is not extended", expected="its base", found=recipe.cache)
    session = BuildSession.of(recipe, worker)
    objects = session.objects
    newest = newest_generation(objects)
    if newest is None:
        raise IncompleteError("the cache is not sealed", where=recipe.cache, remedy="Run teacher-cache build first.")
    refuse_other_texts(session)
    new = list(new_texts(recipe.sources, session.plan, session.tokenizer, recipe.cache))
    pending = session.plan.num_units > int(read_document(objects, seal_key(newest)).body["num_units"])
    if not new and not pending:
        raise InputError("nothing to extend with", expected="new documents or sources", found="none", where=recipe.cache)
    calibrated = session.calibrated  # a teacher that is refused leaves nothing planned
    if pending:
        fill_units(calibrated, objects, worker)
        seal_cache(objects)
    if new:
        if worker.should_make(objects, "extension", next_extension(session.plan)):
            plan_extension(session, new)
        fill_units(session.extended().calibrated, objects, worker)
        seal_cache(objects)
    return session.open()


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    worker: WorkerOption = None,
    processes: ProcessesOption = None,
    as_json: AsJson = False,
) -> None:
    """Append new documents to a sealed cache as its next generation."""
    cache = extend(load_recipe(recipe, overrides or [], CacheRecipe), worker_of(worker, processes))
    say({"cache_id": cache.manifest.cache_id, "generation": cache.seal.generation, "units": cache.seal.num_units}, as_json)
