"""The controllers of a run, and what their decisions are applied to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from run_kit.progress import tell
from student_train.engine.controller import Controller, Decision, Observation
from student_train.engine.gate_watch import GateWatch
from student_train.engine.overhead import OverheadWatch
from student_train.engine.schedule import WeightSchedule
from student_train.losses.gate import Gate
from student_train.losses.objective import Objective


@dataclass(slots=True)
class Engine:
    """`weights` of the terms, as they stand for the next step. `speaks`: whether notices are said here."""

    controllers: Sequence[Controller]
    gate: Gate | None
    speaks: bool
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, objective: Objective, *, speaks: bool) -> Self:
        """The controllers that an objective needs: one for each thing in it that changes while it trains."""
        controllers: list[Controller] = [WeightSchedule(objective)]
        if objective.losses.importance is not None:
            controllers.append(OverheadWatch(objective.losses.importance.overhead_budget))
        if objective.gate is not None:
            controllers.append(GateWatch(objective.gate))
        return cls(controllers, objective.gate, speaks)

    @property
    def needs_forward_seconds(self) -> bool:
        """Whether any of them looks at the time of forward passes."""
        return any(controller.needs_forward_seconds for controller in self.controllers)

    def observe(self, observation: Observation) -> dict[str, float]:
        """Let each controller decide, and apply what it decides.

        Returns:
            what they record of the step.
        """
        record: dict[str, float] = {}
        for controller in self.controllers:
            decision = controller.decide(observation)
            self._apply(decision)
            record |= decision.record
        return record

    def _apply(self, decision: Decision) -> None:
        self.weights = {**self.weights, **decision.weights}
        if self.gate is not None:
            self.gate.observe(decision.level_means)
        if decision.notice is not None and self.speaks:
            tell(decision.notice)
