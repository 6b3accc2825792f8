"""Observe, decide, apply: each controller by itself, and what an engine does with their decisions."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from student_train.engine.controller import Decision, Measured, Observation
from student_train.engine.engine import Engine
from student_train.engine.gate_watch import GateWatch
from student_train.engine.overhead import OverheadWatch
from student_train.engine.schedule import WeightSchedule
from student_train.importance.section import ImportanceSection
from student_train.losses.objective import Objective
from student_train.losses.section import Losses
from student_train.model.distiller import GATE_WEIGHTS

SUMS = {GATE_WEIGHTS: torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])}
BEFORE = Observation(0, 10)
STEP = Measured(1.0, 1.0, 1e-3, 8.0, 1.0, {"smoothness": 0.5, "replay": 2.0}, {}, {"smoothness": 3.0, "replay": 0.0}, SUMS, 1.0)


def after(step: int, **changes: Any) -> Observation:
    return replace(Observation(step, 10, STEP), **changes)


def objective(**losses: Any) -> Objective:
    return Objective(Losses.of(losses), {})


class Gate:
    """What an engine and a controller ask of a gate."""

    levels = ("smoothness", "replay")

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def observe(self, means: dict[str, float]) -> None:
        self.told += [dict(means)] if means else []

    def described(self, sums: torch.Tensor) -> dict[str, float]:
        return {"gate/smoothness/other": float(sums[0, 0, 0] / sums[0, 0, 1])}


def test_the_schedule_is_of_the_step_that_comes() -> None:
    schedule = WeightSchedule(objective(forward_kl={"weight": {"start": 1.0, "end": 0.0}}, parameter_anchor={"weight": 0.3}))
    assert schedule.decide(BEFORE).weights == {"forward_kl": 1.0, "parameter_anchor": 0.3}
    assert schedule.decide(after(4)).weights["forward_kl"] == pytest.approx(0.6)


def test_waiting_is_measured_and_said_once() -> None:
    watch = OverheadWatch(ImportanceSection().overhead_budget)
    assert watch.decide(BEFORE) == Decision()
    assert watch.decide(after(1, wait_seconds=9.0)) == Decision()  # workers start
    assert watch.decide(after(2, wait_seconds=0.01)) == Decision(record={"importance_overhead": 0.01, "importance_alarm": 0.0})
    found = [watch.decide(after(3 + n, wait_seconds=0.5)) for n in range(9)]
    assert [decision.record["importance_alarm"] for decision in found] == [1.0] * 9
    notices = [decision.notice for decision in found if decision.notice is not None]
    assert len(notices) == 1
    assert "more than 3.7%" in notices[0]


def test_the_gate_is_told_of_levels_that_were_there() -> None:
    watch = GateWatch(Gate())  # type: ignore[arg-type]
    assert watch.decide(BEFORE) == Decision()
    found = watch.decide(after(1))
    assert found.level_means == {"smoothness": 0.5}
    assert found.record == {"gate/smoothness/other": 0.5}


@dataclass
class Halves:
    """A controller of a later day: half the weight of one term from now on."""

    needs_forward_seconds: ClassVar[bool] = True

    def decide(self, observation: Observation) -> Decision:
        return Decision(weights={"forward_kl": 0.5}, record={"halved": float(observation.step)}, notice="half")


def test_decisions_are_applied_in_order_and_said_by_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    gate: Any = Gate()
    plain = objective(forward_kl={"weight": 2.0}, cross_entropy={"weight": 1.0})
    engine = Engine([WeightSchedule(plain), Halves(), GateWatch(gate)], gate, speaks=True)
    assert engine.needs_forward_seconds
    engine.observe(BEFORE)
    assert engine.weights == {"forward_kl": 0.5, "cross_entropy": 1.0}
    assert engine.observe(after(1)) == {"halved": 1.0, "gate/smoothness/other": 0.5}
    assert gate.told == [{"smoothness": 0.5}]
    assert capsys.readouterr().err.splitlines() == ["half", "half"]
    Engine([Halves()], None, speaks=False).observe(BEFORE)
    assert not capsys.readouterr().err


def test_an_objective_has_the_controllers_that_it_needs() -> None:
    plain = Engine.of(objective(forward_kl={}), speaks=True)
    assert [type(controller) for controller in plain.controllers] == [WeightSchedule]
    assert not plain.needs_forward_seconds
    weighed = Engine.of(objective(forward_kl={}, importance={}), speaks=True)
    assert [type(controller) for controller in weighed.controllers] == [WeightSchedule, OverheadWatch]
    assert weighed.needs_forward_seconds
