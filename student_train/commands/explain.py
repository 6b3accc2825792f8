"""explain: what a run would optimise, against which cache; refuses what `run` would refuse at its start, without training."""

from typing import Any

from run_kit.recipe_file import load_recipe
from student_train.options import AsJson, Overrides, RecipeArgument, say
from student_train.recipe import RunRecipe


def explain(recipe: RunRecipe) -> dict[str, Any]:
    """Resolve a recipe's objective against its cache and its student, and say it.

    Returns:
        `terms` with weight, formula and what they read of cache and student; those that are `off`, and why; the weights of tokens;
        how many tokens a step, a run and the cache have.
    Raises:
        InputError, MismatchError: as `run` would at its start.
    """
    from student_train.view.explanation import explanation

    return explanation(recipe)


def command(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run would optimise, and refuse what its cache cannot serve, without training."""
    found = explain(load_recipe(recipe, overrides or [], RunRecipe))
    from student_train.view.explanation import text_of

    say(found, text_of, as_json)
