"""How exact the distribution is where a recipe does not say it: `standard`; or, for a cache that was calibrated before that was the
default, what was done then.
"""

import contextlib
from typing import Any

from signal_store.errors import CorruptError
from signal_store.io.objects import Objects
from signal_store.ledger.documents import CALIBRATION, MANIFEST, find_document
from signal_store.signals import DistributionSignal, Quality
from teacher_cache.recipe import CacheRecipe

DEFAULT: Quality = "standard"
ASKS = {"quality", "head", "rank", "max_scaled_kl_nats", "max_angle_degrees"}
"""A recipe that gives any of these says itself how exact the distribution is."""


def with_quality(recipe: CacheRecipe, objects: Objects) -> CacheRecipe:
    """The recipe with a quality in its distribution, where it asks for none."""
    signal = recipe.signals.distribution
    if signal is None or signal.model_fields_set & ASKS:
        return recipe
    given = signal.model_dump(include=signal.model_fields_set)
    before = signal.model_dump(mode="json", include=ASKS)
    taken: dict[str, Any] = before if _standing(objects) == before else {"quality": DEFAULT}
    signals = recipe.signals.model_copy(update={"distribution": DistributionSignal.model_validate({**given, **taken})})
    return recipe.model_copy(update={"signals": signals})


def _standing(objects: Objects) -> dict[str, Any] | None:
    """What the cache was calibrated for, None where it was not yet; a damaged document is for others to find."""
    for key in (CALIBRATION, MANIFEST):
        with contextlib.suppress(CorruptError):
            if (document := find_document(objects, key)) is not None:
                asked = document.body["recipe"] if key == CALIBRATION else document.body
                stored = asked["signals"].get("distribution")
                return None if stored is None else DistributionSignal.model_validate(stored).model_dump(mode="json", include=ASKS)
    return None
