"""sweep: many students from one cache, each a process of its own; a table that fills while they run, and a report ranked by a
metric.

Runs are resumable as any run is: the same command again goes on, and leaves alone what is finished. A run that fails is shown with
its last line of error, and the others go on.
"""

import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from run_kit.recipe_file import load_recipe
from student_train.options import AsJson, Overrides, RecipeArgument, say
from student_train.sweep_recipe import SweepRecipe

if TYPE_CHECKING:
    from run_kit.executor import Executor


def sweep(recipe: SweepRecipe, jobs: int = 1, executor: "Executor | None" = None) -> dict[str, Any]:
    """Run everything, `jobs` at a time on this machine, or as an executor does it. Whatever ends this call ends the runs, which can
    be resumed, and the executor.

    Returns:
        the report, which is also written to `report.json`, `report.md` and `report.png` of the sweep's folder.
    Raises:
        InputError: if a run's recipe is wrong, before any begins.
    """
    from run_kit.executor import LocalExecutor
    from student_train.session.sweep_runs import carry_out

    return carry_out(recipe, LocalExecutor.of(jobs) if executor is None else executor)


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each a process with a device of its own where there are as many.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train many students from one cache, and rank them; exit code 1 if a run failed."""
    loaded = load_recipe(recipe, overrides or [], SweepRecipe)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs too
    report = sweep(loaded, jobs)
    from student_train.session.sweep_report import markdown

    say(report, lambda found: f"\n{markdown(found)}", as_json)
    if report["failed"]:
        raise typer.Exit(1)
