"""Directions of the attention's output, before the residual is added."""

from student_train.losses.direction import Direction, DirectionSection
from student_train.losses.kinds import Kind
from student_train.losses.term import StateTerm


class AttentionDirection(Direction):
    """See `Direction`."""

    name = "attention_direction"
    at = "attention_output"


TERM = StateTerm(section=DirectionSection, kind=Kind.STRUCTURED, module=AttentionDirection, residue=1e-5, across=True)
