"""The shape of an evaluation: a name, what it reads of the cache, and a run over batches that gives numbers with their units."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.model.parallel import ParallelModel

NATS, BITS, SHARE, LABELS = "nats", "bits", "", "labels"
"""Units; a share of something, such as an agreement, has none."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit, "" where it has none."""

    value: float
    unit: str = ""


class Evaluation(Protocol):
    """Of a student as a run holds it, in any number of processes: each gives its own batches, all get the same numbers."""

    @property
    def name(self) -> str:
        """What it is called where several are told apart."""

    @property
    def needs(self) -> SignalRequest:
        """The signals that its batches must hold."""

    def run(self, student: ParallelModel, batches: Iterable[CodedBatch]) -> dict[str, Quantity]:
        """Evaluate on these batches, which are on the CPU. Every rank must call this, with equally many batches.

        Returns:
            by name, the numbers over the batches of all ranks.
        """


def numbers(found: Mapping[str, Quantity]) -> dict[str, float]:
    """The values alone: what a log or a result says."""
    return {name: quantity.value for name, quantity in found.items()}
