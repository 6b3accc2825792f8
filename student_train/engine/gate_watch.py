"""What the gate over the temporal terms is told of their losses, and what its weights were."""

from dataclasses import dataclass
from typing import ClassVar

from student_train.engine.controller import Decision, Observation
from student_train.losses.gate import Gate
from student_train.model.distiller import GATE_WEIGHTS


@dataclass(frozen=True, slots=True)
class GateWatch:
    """Of one gate."""

    gate: Gate
    needs_forward_seconds: ClassVar[bool] = False

    def decide(self, observation: Observation) -> Decision:
        """Means of the levels that had something in the global batch; record its mean weights by level and type of token."""
        measured = observation.measured
        if measured is None:
            return Decision()
        levels = {name: measured.means[name] for name in self.gate.levels if measured.counts[name]}
        return Decision(level_means=levels, record=self.gate.described(measured.extras[GATE_WEIGHTS]))
