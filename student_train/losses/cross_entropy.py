"""Cross-entropy with the text's own next token. The teacher has no part in it."""

from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import LogitsTerm, TermSection


class CrossEntropySection(TermSection):
    """-log q(next token), mean over tokens whose label is stored."""

    weight: WeightField = constant(1.0)


TERM = LogitsTerm(section=CrossEntropySection, kind=Kind.EXPLICIT, divergence=None)
