"""fill: run the teacher over every unit that has no record yet; any number of workers may."""

from typing import TYPE_CHECKING

from run_kit.recipe_file import load_recipe
from teacher_cache.options import AsJson, Overrides, ProcessesOption, RecipeArgument, WorkerOption, say, worker_of
from teacher_cache.recipe import CacheRecipe
from teacher_cache.worker import ALONE, Worker

if TYPE_CHECKING:
    from teacher_cache.builder.calibrate import Calibrated


def fill(recipe: CacheRecipe, worker: Worker = ALONE) -> "Calibrated":
    """Finish every unit; what is committed already is not computed again."""
    from teacher_cache.builder.fill import fill_units
    from teacher_cache.builder.session import BuildSession

    session = BuildSession.ready(recipe, worker)
    fill_units(session.calibrated, session.objects, worker)
    return session.calibrated


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    worker: WorkerOption = None,
    processes: ProcessesOption = None,
    as_json: AsJson = False,
) -> None:
    """Run the teacher over every unit that has no record yet; any number of workers may."""
    done = fill(load_recipe(recipe, overrides or [], CacheRecipe), worker_of(worker, processes))
    say({"cache_id": done.manifest.cache_id, "units": done.plan.num_units}, as_json)
