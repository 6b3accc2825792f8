"""Two tokenizations of one text, walked side by side: which row of the teacher stands behind each row of the student.

A place is a number of symbols from the text's beginning; `ends` say where each token ends. Row t of either side predicts token
t + 1, knowing the text up to its own end. Legend: n teacher's tokens, m student's tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Alignment:
    """By row of the student, int64 and bool [m].

    `teacher`: the teacher's last row that knows no more text than this one, -1 where there is none. `spoken`: how many symbols of
    the teacher's next token this row knows already. `one_to_one`: both rows know the same text, and predict tokens of the same
    symbols. `within`: the student's next token, which spells something, ends no later than the teacher's. The last row of a side,
    whose next token is not among these, is neither.
    """

    teacher: Ints
    spoken: Ints
    one_to_one: NDArray[np.bool_]
    within: NDArray[np.bool_]


def align(teacher_ends: Ints, student_ends: Ints) -> Alignment:
    """Of two lists of ends, neither of which falls; a token that spells nothing, as one put before a text, ends where it begins."""
    teacher = np.searchsorted(teacher_ends, student_ends, side="right") - 1
    known = np.where(teacher >= 0, teacher_ends[teacher.clip(0)], student_ends) if len(teacher_ends) else student_ends
    spoken = student_ends - known
    far = np.iinfo(np.int64).max
    next_of_teacher = np.append(teacher_ends[1:], -1)[teacher] if len(teacher_ends) else np.full(len(student_ends), -1)
    next_of_student = np.append(student_ends, far)[1:]
    has_next = (teacher >= 0) & (next_of_teacher >= 0)
    within = has_next & (next_of_student <= next_of_teacher) & (next_of_student > student_ends)
    return Alignment(teacher, spoken, has_next & (spoken == 0) & (next_of_student == next_of_teacher), within)
