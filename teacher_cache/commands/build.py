"""build: plan, calibrate, fill and seal in one go; goes on where it stopped."""

from signal_store.cache import Cache, newest_generation, open_cache
from signal_store.io.objects import objects_at
from signal_store.ledger.documents import CALIBRATION, read_document
from teacher_cache.builder.fill import fill, finished_units
from teacher_cache.builder.plan import plan, settled
from teacher_cache.builder.recipe_parts import calibrated_part, completed_calibration, refuse_another_recipe
from teacher_cache.builder.seal import seal
from teacher_cache.builder.workers import ALONE, Worker
from teacher_cache.recipe import CacheRecipe
from teacher_cache.teacher.dtype import with_dtype


def build(recipe: CacheRecipe, worker: Worker = ALONE) -> Cache:
    """The sealed cache of a recipe. A cache that is sealed already is opened, without loading the teacher."""
    objects = objects_at(recipe.cache)
    if newest_generation(objects) is None or len(finished_units(objects)) < plan(recipe).num_units:
        fill(recipe, worker)
    else:
        made = completed_calibration(read_document(objects, CALIBRATION).body["recipe"])
        wanted, _ = with_dtype(settled(recipe), objects)
        refuse_another_recipe("calibrated", made, calibrated_part(wanted, plan(recipe).digest), recipe)
    seal(recipe.cache)
    if recipe.base is not None:
        return open_cache([recipe.base, recipe.cache])
    return open_cache(recipe.cache)
