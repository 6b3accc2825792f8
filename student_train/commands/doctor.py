"""doctor: check this machine; `doctor spikes`: which samples were behind the jumps of a run's loss."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from signal_store.errors import InputError
from student_train.options import AsJson, say

if TYPE_CHECKING:
    from student_train.view.spikes import Spike

command = typer.Typer(no_args_is_help=False, help="Check this machine, or look for what was wrong with a run.")


def spikes(run: Path, most: int = 3, suspects: int = 5) -> "list[Spike]":
    """Find the `most` highest spikes of a run's loss, and make the rows of their steps again.

    Returns:
        by step, each with at most `suspects` of its segments, those first that surprised the teacher most.
    Raises:
        NotFoundError: if the folder holds no log.
        InputError: if the run went over to another cache.
        MismatchError: if the rows of a step cannot be made again here.
    """
    from student_train.view.spikes import find_spikes

    return find_spikes(run, most, suspects)


@command.callback(invoke_without_command=True)
def _doctor(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Where runs will be.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, extras, processors, attention, memory, disk; exit code 1 if something will fail."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise InputError("--json stands after the verb", expected="doctor spikes RUN --json", where="doctor")
        return
    from run_kit.environment import checks
    from run_kit.environment import say as say_checks

    say_checks(checks(folder), as_json=as_json)


@command.command("spikes")
def _spikes(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    most: Annotated[int, typer.Option(min=1, help="Spikes to look at, the highest.")] = 3,
    suspects: Annotated[int, typer.Option(min=1, help="Samples of each, the most surprising.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Name the samples behind the jumps of a run's loss, escapes shown."""
    found = spikes(run, most, suspects)
    from student_train.view.spikes import facts_of, text_of

    say(found, text_of, as_json, facts_of)
