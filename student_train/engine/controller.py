"""Observe, decide, apply: what a run changes about itself while it trains, and the values that pass between the three.

A step is observed when its update is made; a controller decides from what it has observed; `Engine` applies the decisions, in the
order of the controllers. Observations hold values of the host: a controller never waits for a device. All of it is of the whole
global batch, so that every rank decides alike; but for times, which are the rank's own: only a record or a notice may rest on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Measured:
    """What one optimizer step was. `means`: by term that was formed, its loss, a mean over what it counts; `weights` and `counts`:
    of every term; `extras`: other sums that terms give, on the CPU; `forward_seconds`: of all forward passes."""

    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: float
    row_fill: float
    means: Mapping[str, float]
    weights: Mapping[str, float]
    counts: Mapping[str, float]
    extras: Mapping[str, Tensor]
    forward_seconds: float


@dataclass(frozen=True, slots=True)
class Observation:
    """`step` optimizer steps of `steps` are done. `measured`: the last of them, which waited `wait_seconds` for its batch; None
    before the first of this process."""

    step: int
    steps: int
    measured: Measured | None = None
    wait_seconds: float = 0.0

    @property
    def progress(self) -> float:
        """Of the run, in [0, 1]."""
        return self.step / self.steps


@dataclass(frozen=True, slots=True)
class Decision:
    """What shall change before the next step, and what a person should know.

    `weights`: of terms, by name; others keep theirs. `level_means`: losses of the temporal levels that the gate measures theirs by.
    `record`: numbers for the step's line of the log. `notice`: one line that is said at once.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    level_means: Mapping[str, float] = field(default_factory=dict)
    record: Mapping[str, float] = field(default_factory=dict)
    notice: str | None = None


class Controller(Protocol):
    """Decides one thing. What it remembers is its own."""

    needs_forward_seconds: ClassVar[bool]
    """Whether forward passes are to be timed, for which a GPU must finish each."""

    def decide(self, observation: Observation) -> Decision:
        """Called before the first step of a process, and after every step."""
