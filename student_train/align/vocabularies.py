"""Two vocabularies beside each other: which tokens are the same, and which of the student's begins each of the teacher's."""

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from student_train.align.spelling import Spelling
from student_train.align.walk import Ints

LAST = chr(0x10FFFF)
"""Behind every symbol."""


@dataclass(frozen=True)
class Vocabularies:
    """Of teacher and student; `rows` of the student's output head, of which those beyond its tokens mean nothing."""

    teacher: Spelling
    student: Spelling
    rows: int
    _ranges: dict[str, tuple[int, int]] = field(default_factory=dict)

    def common(self) -> "Outcomes":
        """The outcomes that both can have."""
        shared = sorted(self.teacher.token_of.keys() & self.student.token_of.keys())
        number = {symbols: place for place, symbols in enumerate(shared)}
        count = len(shared)

        def of(spelling: Spelling, rows: int) -> Ints:
            symbols = [*spelling.symbols, *[""] * (rows - len(spelling.symbols))]
            return np.asarray([number.get(one, count) if one else count + 1 for one in symbols], np.int64)

        return Outcomes(of(self.teacher, len(self.teacher.symbols)), of(self.student, self.rows), count)

    def beginning(self, spoken: int) -> NDArray[np.int32]:
        """int32 [teacher's tokens]: of each, the longest token of the student that begins what it spells behind `spoken` symbols;
        `rows` where there is none."""
        known = self.student.token_of
        longest = max(map(len, known), default=0)
        found = np.full(len(self.teacher.symbols), self.rows, np.int32)
        for token, symbols in enumerate(self.teacher.symbols):
            rest = symbols[spoken : spoken + longest]
            for stop in range(len(rest), 0, -1):
                if rest[:stop] in known:
                    found[token] = known[rest[:stop]]
                    break
        return found

    def sorted_places(self) -> Ints:
        """int64 [teacher's tokens]: the place of each among all of them, sorted by what they spell: those that begin alike are
        neighbours."""
        places = np.empty(len(self.teacher.symbols), np.int64)
        places[list(self.teacher.order)] = np.arange(len(places))
        return places

    def places_that_begin(self, spoken: str) -> tuple[int, int]:
        """(first, one after the last) such place of the teacher's tokens that begin with these symbols."""
        if spoken not in self._ranges:
            key = self.teacher.symbols.__getitem__
            self._ranges[spoken] = (
                bisect_left(self.teacher.order, spoken, key=key),
                bisect_left(self.teacher.order, spoken + LAST, key=key),
            )
        return self._ranges[spoken]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What either vocabulary can say, as outcomes: `common` ones that both can, then one for all that the other cannot say, then
    one for ids that say nothing. `teacher`, `student`: int64, the outcome of each token."""

    teacher: Ints
    student: Ints
    common: int
