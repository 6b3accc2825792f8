"""The weights of the terms as the recipe schedules them, by progress."""

from dataclasses import dataclass
from typing import ClassVar

from student_train.engine.controller import Decision, Observation
from student_train.losses.objective import Objective


@dataclass(frozen=True, slots=True)
class WeightSchedule:
    """Of every term of an objective."""

    objective: Objective
    needs_forward_seconds: ClassVar[bool] = False

    def decide(self, observation: Observation) -> Decision:
        """The weights of the step that comes."""
        return Decision(weights=self.objective.weights(observation.progress))
