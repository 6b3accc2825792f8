"""What importance weights cost a step: its wait for the batch, which holds them, over its forward passes."""

import sys
from dataclasses import dataclass

from student_train.importance.section import ImportanceSection

KEPT = 0.9
"""Share of the moving average that a step leaves."""


@dataclass(slots=True)
class Overhead:
    """A moving average, and whether it has been over its budget; silent where the objective has no weights."""

    section: ImportanceSection | None
    speaks: bool = True
    average: float | None = None
    started: bool = False
    alarmed: bool = False

    def seen(self, waited_seconds: float, forward_seconds: float) -> dict[str, float]:
        """What a step's record says: `importance_overhead`, and `importance_alarm` 1 where it is over the budget."""
        if self.section is None:
            return {}
        if not self.started:  # the first wait is for workers to start and read their first units
            self.started = True
            return {}
        share = waited_seconds / max(forward_seconds, 1e-9)
        self.average = share if self.average is None else KEPT * self.average + (1 - KEPT) * share
        over = self.average > self.section.overhead_budget
        if over and self.speaks and not self.alarmed:
            found, budget = f"{self.average:.1%}", f"{self.section.overhead_budget:.1%}"
            line = f"steps wait {found} of their forward pass for importance weights, more than {budget}: raise stream.workers"
            print(line, file=sys.stderr)  # noqa: T201  (a person should see it while it happens)
            self.alarmed = True
        return {"importance_overhead": self.average, "importance_alarm": float(over)}
