"""What importance weights cost a step: its wait for the batch, which holds them, over its forward passes."""

from dataclasses import dataclass
from typing import ClassVar

from student_train.engine.controller import Decision, Observation

KEPT = 0.9
"""Share of the moving average that a step leaves."""


@dataclass(slots=True)
class OverheadWatch:
    """A moving average of the share, and whether it has been over `budget`, which is said once."""

    budget: float
    needs_forward_seconds: ClassVar[bool] = True
    _average: float | None = None
    _started: bool = False
    _alarmed: bool = False

    def decide(self, observation: Observation) -> Decision:
        """Record `importance_overhead`, and `importance_alarm`, 1 where it is over the budget."""
        if observation.measured is None:
            return Decision()
        if not self._started:  # the first wait is for workers to start and read their first units
            self._started = True
            return Decision()
        share = observation.wait_seconds / max(observation.measured.forward_seconds, 1e-9)
        self._average = share if self._average is None else KEPT * self._average + (1 - KEPT) * share
        over, notice = self._average > self.budget, None
        if over and not self._alarmed:
            found, budget = f"{self._average:.1%}", f"{self.budget:.1%}"
            notice = f"steps wait {found} of their forward pass for importance weights, more than {budget}: raise stream.workers"
            self._alarmed = True
        return Decision(record={"importance_overhead": self._average, "importance_alarm": float(over)}, notice=notice)
