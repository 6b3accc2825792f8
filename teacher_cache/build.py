"""build: plan, calibrate, fill and seal in one go; goes on where it stopped."""

from signal_store.cache import Cache, open_cache
from signal_store.ledger import CALIBRATION, find_document, read_document, seal_key
from signal_store.objects import LocalObjects
from teacher_cache.calibrate import calibrated_part
from teacher_cache.fill import fill
from teacher_cache.plan import plan, refuse_another_recipe
from teacher_cache.recipe import CacheRecipe
from teacher_cache.seal import seal


def build(recipe: CacheRecipe) -> Cache:
    """The sealed cache of a recipe. A cache that is sealed already is opened, without loading the teacher."""
    objects = LocalObjects(recipe.cache)
    if find_document(objects, seal_key(0)) is None:
        fill(recipe)
    else:
        made = read_document(objects, CALIBRATION).body["recipe"]
        refuse_another_recipe("calibrated", made, calibrated_part(recipe, plan(recipe)), recipe)
    seal(recipe.cache)
    return open_cache(recipe.cache)
