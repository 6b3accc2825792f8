"""The command line `student-train`. Verbs import what they need when they run, so that `--help` does not import torch."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from run_kit.command_line import run_app
from run_kit.recipe_file import load_recipe
from signal_store.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe in YAML.", metavar="RECIPE.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as steps=200.", metavar="[KEY=VALUE]...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def run(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a student from a sealed cache; go on where it stopped."""
    from student_train.recipe import RunRecipe

    loaded = load_recipe(recipe, overrides or [], RunRecipe)  # a mistake is said before torch is imported
    from student_train.commands import run as command

    result = command.run(loaded)
    typer.echo(json.dumps(result) if as_json else command.text_of(result))


@app.command()
def explain(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run would optimise, and refuse what its cache cannot serve, without training."""
    from student_train.recipe import RunRecipe

    loaded = load_recipe(recipe, overrides or [], RunRecipe)
    from student_train.commands import explain as command

    found = command.explain(loaded)
    typer.echo(json.dumps(found) if as_json else command.text_of(found))


@app.command()
def sweep(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each a process with a device of its own where there are as many.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train many students from one cache, and rank them; exit code 1 if a run failed."""
    from student_train.sweep_recipe import SweepRecipe

    loaded = load_recipe(recipe, overrides or [], SweepRecipe)
    from student_train.commands import sweep as command

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs too
    report = command.sweep(loaded, jobs)
    typer.echo(json.dumps(report) if as_json else command.text_of(report))
    if report["failed"]:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    evaluation: Annotated[Path | None, typer.Option(help="What `fidelity --json` said of the last student.")] = None,
    write: Annotated[Path | None, typer.Option(help="Where the recipe of these choices goes, as YAML.")] = None,
    as_json: AsJson = False,
) -> None:
    """Propose an objective for this cache, student, text and machine: each choice with its reason. Nothing is applied."""
    from student_train.commands import plan as command

    choices = command.plan(load_recipe(recipe, overrides or [], command.PlanRecipe), evaluation, write)
    if as_json:
        typer.echo(json.dumps(command.facts_of(choices)))
    else:
        _print(command.text_of(choices))


@app.command()
def fidelity(
    student: Annotated[Path, typer.Argument(help="Folder of a student, such as OUT/student.", metavar="STUDENT")],
    cache: Annotated[list[str], typer.Argument(help="A cache with a validation split, and its overlays.", metavar="CACHE...")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Look at so many tokens only.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the student under bfloat16 autocast.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how much of its teacher a student has kept, on held-out text: agreement, overlap, KL, entropy gap, calibration, CKA by
    depth."""
    from student_train.commands import fidelity as command

    found = command.evaluated(student, tuple(cache), max_tokens, bf16=bf16)
    typer.echo(json.dumps(command.facts_of(found)) if as_json else command.text_of(found))


@app.command()
def generate(
    student: Annotated[Path, typer.Argument(help="Folder of a student, such as OUT/student.", metavar="STUDENT")],
    cache: Annotated[str, typer.Argument(help="The cache whose texts begin its own.", metavar="CACHE")],
    out: Annotated[Path, typer.Option(help="JSON lines of prompt and completion: a source for `teacher-cache extend`.")],
    samples: Annotated[int, typer.Option(min=1, help="Texts to begin.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the student while it writes.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Keep texts that were cut off.")] = False,
) -> None:
    """Let a student write, for its teacher to score: the next round's text."""
    from student_train.commands import generate as command

    sampling: dict[str, Any] = {"samples": samples, "new_tokens": new_tokens, "temperature": temperature, "seed": seed}
    found = command.generate(student, cache, out, unfinished=unfinished, **sampling)
    typer.echo(command.text_of(found))
    if (hint := command.hint_of(found)) is not None:
        typer.echo(hint, err=True)


@app.command("show-weights")
def show_weights(
    cache: Annotated[str, typer.Argument(help="A cache with tags.", metavar="CACHE")],
    segment: Annotated[int, typer.Option(help="Number of the segment.")] = 0,
    rules: Annotated[Path | None, typer.Option(help="YAML on top of the shipped rules.")] = None,
    surface: Annotated[Path | None, typer.Option(help="Also draw the weight over impact and confidence, as a picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a segment's text coloured by the importance of its tokens: blue 0.2, grey 1, red 3."""
    from student_train.commands import show_weights as command

    tokens = command.show_weights(cache, segment, rules, surface)
    if as_json:
        typer.echo(json.dumps(command.facts_of(tokens)))
    else:
        _print(command.text_of(tokens))


@app.command("plot-shares")
def plot_shares(
    run: Annotated[Path, typer.Argument(help="Folder of a run with gradient_shares_every.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("gradient_shares.png"),
) -> None:
    """Draw each term's share of the gradient over the steps of a run."""
    from student_train.commands import plot_shares as command

    command.plot_shares(run, out)
    typer.echo(str(out))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of many runs, such as a sweep's.", metavar="RUN...")],
    html: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    students: Annotated[
        bool, typer.Option("--students", help="Load the finished students, and show them beside their teacher.")
    ] = False,
) -> None:
    """Write one page that compares runs: results, recipes, curves, terms, gradient shares."""
    from student_train.commands import report as command

    command.report(runs, html, students=students)
    typer.echo(str(html))


doctor = typer.Typer(no_args_is_help=False, help="Check this machine, or look for what was wrong with a run.")
app.add_typer(doctor, name="doctor")


@doctor.callback(invoke_without_command=True)
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
    from run_kit.environment import checks, say

    say(checks(folder), as_json=as_json)


@doctor.command()
def spikes(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    most: Annotated[int, typer.Option(min=1, help="Spikes to look at, the highest.")] = 3,
    suspects: Annotated[int, typer.Option(min=1, help="Samples of each, the most surprising.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Name the samples behind the jumps of a run's loss, escapes shown."""
    from student_train.commands import spikes as command

    found = command.spikes(run, most, suspects)
    typer.echo(json.dumps(command.facts_of(found)) if as_json else command.text_of(found))


def _print(what: Any) -> None:
    """What rich lays out, such as a table."""
    from rich.console import Console

    Console().print(what)


def main() -> None:
    """Entry point."""
    run_app(app, extra="student")


if __name__ == "__main__":
    main()
