"""What a signal is to the contract: its section of a recipe, the arrays that hold it, and what they mean.

A signal is a file of this folder with one class `Signal` of its name; `signal_store.signals` finds it. How it is taken from a
teacher is in `teacher_cache/signals/`, how a student reads it in `student_train/data/signals/`, each in a file of the same name.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.format.section import Section


class Meaning(NamedTuple):
    """What the arrays whose path matches a regular expression hold, and in which unit."""

    pattern: str
    what: str
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What the shapes of a cache's arrays follow from. `calibration`: the body of the calibration document."""

    unit_tokens: int
    vocab_size: int
    hidden_size: int
    capacities: Capacities
    calibration: Mapping[str, Any]

    def found(self, signal: str) -> Any:
        """What calibration decided of a signal that keeps its findings under its own name; None where nothing."""
        return self.calibration.get("signals", {}).get(signal)


class Signal(Section):
    """One signal of a cache: a section of its recipe. Its name, in the recipe and in the hierarchy, is that of its file."""

    meanings: ClassVar[tuple[Meaning, ...]] = ()
    """Of its arrays; paths that no pattern matches have no meaning that this version knows."""

    @classmethod
    def name(cls) -> str:
        """As recipes and paths spell it."""
        return cls.__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """The arrays that hold it, in the order of the manifest."""
