"""calibrate: run the teacher on a few thousand tokens; what depends on it is fixed then, and the manifest frozen."""

from typing import TYPE_CHECKING

from run_kit.recipe_file import load_recipe
from teacher_cache.options import AsJson, Overrides, ProcessesOption, RecipeArgument, say, worker_of
from teacher_cache.recipe import CacheRecipe
from teacher_cache.worker import ALONE, Worker

if TYPE_CHECKING:
    from teacher_cache.builder.calibrate import Calibrated


def calibrate(recipe: CacheRecipe, worker: Worker = ALONE) -> "Calibrated":
    """Calibrate, or take the calibration that stands; MismatchError if another teacher or recipe of signals made it."""
    from teacher_cache.builder.session import BuildSession

    return BuildSession.ready(recipe, worker).calibrated


def command(
    recipe: RecipeArgument, overrides: Overrides = None, processes: ProcessesOption = None, as_json: AsJson = False
) -> None:
    """Run the teacher on a few thousand tokens; freeze basis, rank, heads, steps and the manifest."""
    manifest = calibrate(load_recipe(recipe, overrides or [], CacheRecipe), worker_of("0/1", processes)).manifest
    say({"cache_id": manifest.cache_id, "tail_rank": manifest.calibration.tail_rank, "forward": manifest.plan.forward}, as_json)
