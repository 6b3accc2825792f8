"""The kinds of knowledge that a term can carry from a teacher to a student. This file does not import torch: recipes name it."""

from enum import StrEnum


class Kind(StrEnum):
    """Of knowledge; `about` says it in words."""

    EXPLICIT = "explicit"
    IMPLICIT = "implicit"
    STRUCTURED = "structured"
    TEMPORAL = "temporal"
    TASK = "task"

    @property
    def about(self) -> str:
        """What is carried."""
        return _ABOUT[self]


_ABOUT = {
    Kind.EXPLICIT: "token distributions",
    Kind.IMPLICIT: "statistics of attention and activations",
    Kind.STRUCTURED: "features and residual maps",
    Kind.TEMPORAL: "how states and attention move along the text",
    Kind.TASK: "evidence of answers, coverage of summaries",
}
