"""build: plan, calibrate, fill and seal in one go; goes on where it stopped."""

from signal_store.cache import Cache, open_cache
from signal_store.ledger import find_document, seal_key
from signal_store.objects import LocalObjects
from teacher_cache.fill import fill
from teacher_cache.plan import plan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.seal import seal


def build(recipe: CacheRecipe) -> Cache:
    """The sealed cache of a recipe. A cache that is sealed already is opened, without loading the teacher."""
    if find_document(LocalObjects(recipe.cache), seal_key(0)) is None:
        fill(recipe)
    else:
        plan(recipe)  # refuses a recipe that made another cache
    seal(recipe.cache)
    return open_cache(recipe.cache)
