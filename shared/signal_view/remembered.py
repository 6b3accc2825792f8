"""What is made once for each cache, and goes when the cache goes."""

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

from signal_store.cache import Cache

Made = TypeVar("Made")


def once_per_cache(make: Callable[[Cache], Made]) -> Callable[[Cache], Made]:
    """The same function, whose answer is kept for as long as the cache lives."""
    made: WeakKeyDictionary[Cache, Made] = WeakKeyDictionary()

    def remembered(cache: Cache) -> Made:
        if cache not in made:
            made[cache] = make(cache)
        return made[cache]

    return remembered
