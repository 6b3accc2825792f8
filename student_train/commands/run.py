"""run: train a student from a cache, and leave a plain `save_pretrained` folder. Started again, it goes on where it stopped."""

from collections.abc import Mapping
from typing import Any

from run_kit.recipe_file import load_recipe
from student_train.options import AsJson, Overrides, RecipeArgument, say
from student_train.recipe import RunRecipe


def run(recipe: RunRecipe) -> dict[str, Any]:
    """Train and export. A finished run is not repeated, an unfinished one goes on from its last checkpoint. Started by torchrun or
    accelerate launch, its processes train one student together; the first of them claims the folder for all.

    Returns:
        what `result.json` says.
    Raises:
        InputError, MismatchError: if the recipe cannot be run on this cache, or the folder holds another run; before any training.
        SignalStoreError: if the loss is not finite, with the texts of the step.
    """
    from student_train.session.training import train_in_folder

    return train_in_folder(recipe)


def text_of(result: Mapping[str, Any]) -> str:
    """For a terminal: one line."""
    return "  ".join(f"{name}: {_short(value)}" for name, value in result.items())


def _short(value: object) -> str:
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.4f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def command(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a student from a sealed cache; go on where it stopped."""
    say(run(load_recipe(recipe, overrides or [], RunRecipe)), text_of, as_json)
