"""plan: tokenize, cut segments, fix positions and units. Needs no teacher but its config and tokenizer."""

from typing import TYPE_CHECKING

from run_kit.recipe_file import load_recipe
from teacher_cache.options import AsJson, Overrides, ProcessesOption, RecipeArgument, say, tokens_by_name, worker_of
from teacher_cache.recipe import CacheRecipe
from teacher_cache.worker import ALONE, Worker

if TYPE_CHECKING:
    from teacher_cache.builder.plan import Plan


def plan(recipe: CacheRecipe, worker: Worker = ALONE) -> "Plan":
    """Make the plan, or take the one that stands; MismatchError if that was made by another recipe."""
    from teacher_cache.builder.session import BuildSession

    return BuildSession.of(recipe, worker).planned().plan


def command(
    recipe: RecipeArgument, overrides: Overrides = None, processes: ProcessesOption = None, as_json: AsJson = False
) -> None:
    """Tokenize, cut segments, fix positions and units."""
    made = plan(load_recipe(recipe, overrides or [], CacheRecipe), worker_of("0/1", processes))
    facts: dict[str, object] = {"plan": made.digest, "units": made.num_units, "tokens": tokens_by_name(made.sources)}
    skipped = {source.name: source.num_skipped_rows for source in made.sources if source.num_skipped_rows}
    say(facts | ({"skipped_rows": skipped} if skipped else {}), as_json)
