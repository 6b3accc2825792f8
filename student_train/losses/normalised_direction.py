"""Directions of the normalised input of the FFN."""

from student_train.losses.direction import Direction, DirectionSection
from student_train.losses.kinds import Kind
from student_train.losses.term import StateTerm


class NormalisedDirection(Direction):
    """See `Direction`."""

    name = "normalised_direction"
    at = "ffn_input"


TERM = StateTerm(section=DirectionSection, kind=Kind.STRUCTURED, module=NormalisedDirection, residue=1e-5, across=True)
