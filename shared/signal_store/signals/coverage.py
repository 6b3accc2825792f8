"""Which key words of a text its summary says."""

from typing import ClassVar

from pydantic import Field

from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.format.grid import id_dtype, position_array, rounded_capacity, row_range_arrays
from signal_store.signals.base import Dimensions, Meaning, Signal

MOST_COVERAGE_WORDS = 256
"""Key words of a prompt that a plan keeps, and that a coverage signal may ask for."""


class CoverageSignal(Signal):
    """Which key words of a text its summary says, of sources with `task: summary` and a tagger: the probability
    that a word of the prompt, told by its first token, comes up in one of the summary's rows at least."""

    meanings: ClassVar[tuple[Meaning, ...]] = (
        Meaning(r"coverage/rows/token", "first token of a key word", "id"),
        Meaning(r"coverage/words/probability", "probability that the summary says it", "probability"),
    )

    words: int = Field(32, ge=1, le=MOST_COVERAGE_WORDS)
    """Nouns and names of a segment's prompt, of code its identifiers, the most frequent first."""

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """One row a key word."""
        capacities = dimensions.capacities
        return (*row_range_arrays("coverage", capacities.segments), *coverage_arrays(capacities, dimensions.vocab_size))


def coverage_arrays(capacities: Capacities, vocab_size: int) -> tuple[ArraySpec, ...]:
    """One row per key word of a prompt: where it first stands, its first token, and the probability that the summary says it."""
    rows = rounded_capacity(capacities.coverage_rows)
    return (
        position_array("coverage", capacities.coverage_rows),
        ArraySpec.of("coverage/rows/token", id_dtype(vocab_size), rows, "row", shuffle="shuffle"),
        ArraySpec.of("coverage/words/probability", "float16", rows, "row", shuffle="shuffle"),
    )
