"""What of a recipe makes another run, and what only says how it is computed, watched or kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from student_train.model import precision
from student_train.model.precision import choose_precision, emulated
from student_train.recipe import RunRecipe
from student_train.session.identity import ROLES, identity, role_of, rules_digest
from student_train.session.run_record import Begun, refuse_another_run

BASE: dict[str, Any] = {
    "cache": "c.zarr",
    "out": "o",
    "student": {"config": {"model_type": "llama"}},
    "losses": {"cross_entropy": {}},
    "steps": 3,
}


def recipe_of(**changes: Any) -> RunRecipe:
    return RunRecipe.model_validate({**BASE, **changes})


def places(model: type[BaseModel], inside: str = "") -> Iterator[str]:
    """Every dotted place that a recipe's fields have."""
    for name, field in model.model_fields.items():
        parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
        sections = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        if sections and f"{inside}{name}" not in ROLES:
            yield from places(sections[0], f"{inside}{name}.")
        else:
            yield f"{inside}{name}"


def test_every_field_has_been_thought_about() -> None:
    assert [place for place in places(RunRecipe) if role_of(place) not in {"is", "computed", "watched", "kept"}] == []
    assert {name for name in ROLES if name.split(".")[0] not in RunRecipe.model_fields} == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16"},
        {"activation_checkpointing": True},
        {"compile": True},
        {"stream": {"micro_batch_rows": 2, "workers": 3}},
        {"student": {"config": {"model_type": "llama"}, "attn_implementation": "eager", "trust_remote_code": True}},
        {"parallel": {"mode": "sharded", "cpu_offload": True}},
        {"tensorboard": True, "gradient_shares_every": 5},
        {"validation": {"every": 7}},
        {"checkpoint": {"every": 1, "keep": 9}},
        {"out": "elsewhere", "cache": "moved.zarr"},
    ],
)
def test_how_it_is_computed_is_no_other_run(changes: dict[str, Any]) -> None:
    assert identity(recipe_of(**changes)) == identity(recipe_of())


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("steps", {"steps": 4}),
        ("seed", {"seed": 1}),
        ("student.lora.rank", {"student": {"checkpoint": "x", "lora": {"rank": 2}}}),
        ("losses.cross_entropy.weight", {"losses": {"cross_entropy": {"weight": 0.5}}}),
        ("optimizer.learning_rate", {"optimizer": {"learning_rate": 1.0}}),
        ("stream.global_batch_rows", {"stream": {"global_batch_rows": 8}}),
        ("stream.lanes", {"stream": {"lanes": 1}}),
        ("validation.every", {"validation": {"every": 7, "patience": 2}}),
        ("validation.max_tokens", {"validation": {"max_tokens": 7}, "export": "best"}),
    ],
)
def test_what_decides_the_numbers_is(place: str, changes: dict[str, Any]) -> None:
    found = identity(recipe_of(**changes))
    assert place in found
    assert found != identity(recipe_of())


def test_rules_of_importance_count_by_what_they_say(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("default: 0.4\n")
    losses = {"forward_kl": {}, "importance": {"rules": str(rules)}}
    recipe = recipe_of(losses=losses)
    before = rules_digest(recipe)
    rules.write_text("default: 0.6\n")
    assert rules_digest(recipe) != before
    assert identity(recipe_of(losses={"forward_kl": {}, "importance": {"overhead_budget": 0.5}})) == identity(recipe)
    assert identity(recipe_of(losses={"forward_kl": {}})) != identity(recipe)
    about = {"recipe": recipe.model_dump(mode="json"), "cache_id": "c", "rules_digest": before, "recipe_digest": "r"}
    with pytest.raises(ValueError, match=r"another run \(rules_digest differ\)"):
        refuse_another_run(Begun(about), recipe, "c")


def test_a_record_without_a_later_field_is_the_same_run() -> None:
    recipe = recipe_of()
    content = recipe.model_dump(mode="json")
    del content["precision"], content["optimizer"]["eps"], content["stream"]["window_units"]
    begun = Begun({"recipe": content, "cache_id": "c", "recipe_digest": "as another version made it"})
    refuse_another_run(begun, recipe, "c")
    assert begun.run_id(recipe, "c") == "as another version made it"
    assert begun.run_id(recipe_of(steps=4), "c") != "as another version made it"
    with pytest.raises(ValueError, match="cache_id differ"):
        refuse_another_run(begun, recipe, "d")


def test_auto_takes_what_the_device_has_units_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    native = {torch.float32: "every device has float32 units"}
    monkeypatch.setattr(precision, "native_dtypes", lambda _: native)
    assert choose_precision("auto", device).name == "float32"
    assert choose_precision("bfloat16", device).bf16
    native[torch.bfloat16] = "this CPU has amx_bf16"
    assert choose_precision("auto", device).bf16
    assert choose_precision("auto", device).reason == "auto: this CPU has amx_bf16"
    assert choose_precision("float32", device).name == "float32"
    old = Begun({"recipe": {"steps": 3}})  # of before there was `auto`: float32 was the default
    assert choose_precision("auto", device, old.precision).name == "float32"
    del native[torch.bfloat16]
    assert choose_precision("auto", device, "bfloat16").name == "float32"


def test_a_record_of_before_rules_were_written_down_is_the_same_run() -> None:
    recipe = RunRecipe.model_validate({**recipe_of().model_dump(mode="json"), "losses": {"forward_kl": {}, "importance": {}}})
    begun = Begun({"recipe": recipe.model_dump(mode="json"), "cache_id": "c", "recipe_digest": "r"})
    refuse_another_run(begun, recipe, "c")


def test_an_emulated_precision_is_said_with_both_rates() -> None:
    device = torch.device("cpu")
    chosen = choose_precision("float16", device)  # which no CPU of these tests multiplies; a recipe cannot name it
    said = emulated(chosen, device)
    assert said is None or (said.count("GFLOP/s") == 1 and "float32" in said and said.startswith("precision: float16 is emulated"))
    assert emulated(choose_precision("float32", device), device) is None
