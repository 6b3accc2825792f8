"""A student with the teacher's tokenizer: its tokens are the cache's.

Batches take ids, labels and places through an aligner and nowhere else: for a student that reads other tokens, another class has
these methods.
"""

import numpy as np
from numpy.typing import NDArray

from student_train.data.unit import UnitReader, UnitText


class IdentityAligner:
    """Token for token."""

    def text(self, unit: UnitReader) -> UnitText:
        """The student's tokens of a unit, with their labels."""
        return unit.text

    def segment_tokens(self, unit: UnitReader, segment: int) -> slice:
        """A segment's tokens among those of `text`."""
        start = int(unit.segments["token_start"][segment])
        return slice(start, start + int(unit.segments["length"][segment]))

    def places(self, _unit: UnitReader, _segment: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where tokens of the cache, by their places in a segment, stand among the student's tokens of it."""
        return places
