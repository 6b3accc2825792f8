"""Roles of words, which need no teacher: a cache holds them where a source has a tagger."""

from typing import Any, ClassVar

from signal_store.format.arrays import ArraySpec
from signal_store.format.roles import LEVELS
from signal_store.signals.base import Dimensions, Meaning, Signal


class TagsSignal(Signal):
    """Roles of each token's word. Not of the recipe's signals: sources ask for it."""

    meanings: ClassVar[tuple[Meaning, ...]] = (Meaning(r"tags/roles", "roles of the token's word", "code"),)

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """One row a token; what the numbers mean stands in the attributes."""
        return tag_arrays(dimensions.unit_tokens)


def tag_arrays(unit_tokens: int) -> tuple[ArraySpec, ...]:
    """Roles of each token's word; what the numbers mean stands in the attributes."""
    names: dict[str, Any] = {level: ",".join(names) for level, names in LEVELS.items()}
    shape, columns = (len(LEVELS),), ",".join(LEVELS)
    return (ArraySpec.of("tags/roles", "uint8", unit_tokens, "token", "level", row_shape=shape, columns=columns, **names),)
