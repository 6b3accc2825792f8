"""Sources in other proportions than the cache's, chosen at training time.

A source's weight becomes a number of copies of each of its segments in an epoch: the whole part always, the rest by a keyed coin.
The epoch stays as long as it was, in what is counted (tokens or segments). Deterministic, and O(1) memory.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from signal_store.cache import Cache
from signal_store.errors import InputError
from student_train.data.order import key_of
from student_train.data.unit import UnitReader


@dataclass(frozen=True, slots=True)
class Mixing:
    """`copies_of`: by number of a source, how often each of its segments comes in an epoch, on average; empty for once each."""

    copies_of: Mapping[int, float]

    @classmethod
    def of(cls, cache: Cache, weights: Mapping[str, float] | None, by: Literal["tokens", "samples"]) -> Self:
        """From the recipe's weights by source name; InputError for a name that no train source has, or no weight above 0."""
        if weights is None:
            return cls({})
        train = [(number, source) for number, source in enumerate(cache.sources) if source.split == "train"]
        names = {source.name for _, source in train}
        if unknown := sorted(weights.keys() - names):
            raise InputError("no such train source", expected=f"of {sorted(names)}", found=unknown, where="stream.mix")
        if missing := sorted(names - weights.keys()):
            raise InputError(
                "a train source has no weight", expected="one for each, 0 to leave out", found=missing, where="stream.mix"
            )
        if not any(weights.values()):
            raise InputError("every weight is 0", expected="one above 0", where="stream.mix")
        held: Counter[str] = Counter()  # extensions may hold one source in parts
        for _, source in train:
            held[source.name] += source.num_tokens if by == "tokens" else source.num_segments
        share = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        total = sum(held.values())
        return cls({number: share[source.name] * total / max(1, held[source.name]) for number, source in train})

    def copies(self, unit: UnitReader, segment: int, key: int) -> int:
        """How often the segment comes in the epoch of this key."""
        if not self.copies_of:
            return 1
        wanted = self.copies_of[int(unit.segments["source"][segment])]
        coin = key_of(key % 2**62, unit.first_segment + segment) / 2**64
        return int(wanted) + (coin < wanted % 1)
