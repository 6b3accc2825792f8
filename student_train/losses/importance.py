"""Weights of the divergences' tokens: no loss of its own. What computes them is `student_train.importance`."""

from student_train.importance.section import ImportanceSection
from student_train.losses.term import TokenWeightsTerm

TERM = TokenWeightsTerm(section=ImportanceSection)
