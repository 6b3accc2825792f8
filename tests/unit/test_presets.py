"""Presets, and kinds of knowledge that are left out by name."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model_taps.segment_statistics import ffn_statistics
from student_train.losses import registry
from student_train.losses.kinds import Kind
from student_train.losses.presets import PRESETS
from student_train.losses.section import Losses
from student_train.recipe import RunRecipe


def recipe(**parts: Any) -> RunRecipe:
    return RunRecipe.model_validate({"cache": "c", "out": "o", "student": {"checkpoint": "s"}, "steps": 1, **parts})


def test_every_term_has_a_kind_and_a_full_preset_has_them_all() -> None:
    assert set(registry.kinds().values()) == set(Kind)
    assert recipe(preset="every_kind").objective.empty_kinds() == ()
    assert not {"lhsm", "cross_entropy"} & PRESETS["every_kind"].losses.keys()  # no plain squared error


def test_a_full_preset_refuses_to_leave_a_kind_empty_in_silence() -> None:
    emptied = {"evidence": None, "coverage": None}
    with pytest.raises(ValidationError, match="nothing carries task knowledge"):
        recipe(preset="every_kind", losses=emptied)
    assert recipe(preset="every_kind", losses=emptied, without=["task"]).objective.empty_kinds() == ("task",)
    assert recipe(preset="every_kind", losses={"evidence": None}).objective.coverage is not None


@pytest.mark.parametrize("kind", list(Kind))
def test_without_a_kind_all_else_stays(kind: str) -> None:
    whole, part = (dict(recipe(preset="every_kind", **extra).objective) for extra in ({}, {"without": [kind]}))
    gone = {name for name in whole if whole[name] is not None and part[name] is None}
    expected = {name for name, of in registry.kinds().items() if of == kind and whole[name] is not None}
    assert gone == expected | ({"importance"} if kind == "explicit" else set())
    assert all(part[name] == whole[name] for name in whole.keys() - gone)


def test_what_is_off_is_nothing() -> None:
    with pytest.raises(ValidationError, match="no loss"):
        recipe(losses={"forward_kl": {}}, without=["explicit"])
    assert Losses.of({}).empty_kinds() == tuple(Kind)


def test_sparsity_has_a_gradient() -> None:
    activations = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    segments = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda a: ffn_statistics(a, segments, 2)[:, 1], activations)
