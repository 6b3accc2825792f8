"""Random draws of places, keyed by seed and by the segment's own tokens: the same wherever the segment lies."""

from collections.abc import Callable

import numpy as np

from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.unit_work import Places

Key = tuple[int, int]


def per_segment(unit: UnitPlan, choose: Callable[[int, Places], Places]) -> Places:
    """What is chosen of each segment's own places: those that are not context only."""
    parts = []
    for segment, (start, length) in enumerate(zip(unit.token_start, unit.length, strict=True)):
        parts.append(choose(segment, np.arange(start + unit.context_only[segment], start + length)))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def key_of(unit: UnitPlan, segment: int, seed: int) -> Key:
    """Of a segment's draws."""
    return seed, int(unit.token_hash[segment])


def drawn(places: Places, count: int, key: Key) -> Places:
    """`count` of the places without replacement, ascending."""
    return np.sort(generator(key).permutation(places)[:count])


def generator(key: Key) -> np.random.Generator:
    """Whose numbers are a function of the key."""
    return np.random.Generator(np.random.Philox(key=np.asarray(key, dtype=np.uint64)))
