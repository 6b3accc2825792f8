"""plan: looks at cache, student, texts, machine and the last evaluation, and proposes an objective, a reason for each choice."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from run_kit.command_line import check_target
from run_kit.recipe_file import load_recipe
from student_train.options import AsJson, Overrides, RecipeArgument, say
from student_train.recipe import RunRecipe
from student_train.sweep_recipe import apply_value

if TYPE_CHECKING:
    from rich.table import Table

    from student_train.engine.planner import Choice


class PlanRecipe(RunRecipe):
    """A run recipe that need not say what is optimised. Terms that it names and the planner does not decide stay as they are."""

    def _check_objective(self) -> None:
        """None is needed before the choices are made."""


def plan(recipe: PlanRecipe, evaluation: Path | None = None, write: Path | None = None) -> "list[Choice]":
    """Propose an objective; nothing is applied.

    Args:
        evaluation: what `student-train fidelity --json` said of the last student.
        write: where the recipe that the choices make goes, as YAML.
    Returns:
        one choice for each question, with its reason.
    Raises:
        InputError: if the cache holds no distribution, or `evaluation` is none.
    """
    from signal_store.cache import open_cache
    from student_train.engine.facts import gather
    from student_train.engine.planner import propose
    from student_train.losses import registry
    from student_train.student.build import build_student

    if write is not None:
        check_target(write)
    cache = open_cache(recipe.cache)
    student, _ = build_student(recipe.student, cache)
    without = frozenset(name for name, kind in registry.kinds().items() if kind in recipe.without)
    choices = propose(gather(cache, student, recipe.stream, without, evaluation))
    if write is not None:
        import yaml

        write.write_text(yaml.safe_dump(planned_recipe(recipe, choices), sort_keys=False))
    return choices


def planned_recipe(recipe: PlanRecipe, choices: "Sequence[Choice]") -> dict[str, Any]:
    """The run recipe that the choices make, as plain data."""
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True, exclude={"preset"})
    decided = {choice.place.removeprefix("losses.") for choice in choices}
    asked = content.get("losses") or {}
    content["losses"] = {name: options for name, options in asked.items() if name not in decided}
    for choice in choices:
        if choice.value is not None:
            name = choice.place.removeprefix("losses.")
            given = asked.get(name) if choice.value == {} else None
            apply_value(content, choice.place, given or choice.value)
    return content


def text_of(choices: "Sequence[Choice]") -> "Table":
    """For a terminal: a row a choice."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("place", "value", "why")
    for choice in choices:
        shown = "off" if choice.value is None else "on" if choice.value == {} else json.dumps(choice.value)
        table.add_row(choice.place, escape(shown), escape(choice.why))
    return table


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    evaluation: Annotated[Path | None, typer.Option(help="What `fidelity --json` said of the last student.")] = None,
    write: Annotated[Path | None, typer.Option(help="Where the recipe of these choices goes, as YAML.")] = None,
    as_json: AsJson = False,
) -> None:
    """Propose an objective for this cache, student, text and machine: each choice with its reason. Nothing is applied."""
    choices = plan(load_recipe(recipe, overrides or [], PlanRecipe), evaluation, write)
    say(choices, text_of, as_json, lambda found: [asdict(choice) for choice in found])
