"""The command line `student-train`. Verbs import what they need when they run, so that `--help` does not import torch."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from run_kit.command_line import check_target, run_app
from run_kit.recipe_file import load_recipe
from signal_store.errors import InputError
from student_train.recipe import RunRecipe
from student_train.sweep_recipe import SweepRecipe

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe in YAML.", metavar="RECIPE.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as steps=200.", metavar="[KEY=VALUE]...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def run(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a student from a sealed cache; go on where it stopped."""
    loaded = load_recipe(recipe, overrides or [], RunRecipe)
    from student_train.commands.run import run as train

    result = train(loaded)
    typer.echo(json.dumps(result) if as_json else "  ".join(f"{key}: {_short(value)}" for key, value in result.items()))


def _short(value: object) -> str:
    return (
        f"{value:.4f}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:,.0f}"
        if isinstance(value, int | float)
        else str(value)
    )


@app.command()
def explain(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run would optimise, and refuse what its cache cannot serve, without training."""
    loaded = load_recipe(recipe, overrides or [], RunRecipe)
    from student_train.commands.explain import explain as look

    found = look(loaded)
    if as_json:
        typer.echo(json.dumps(found))
        return
    from student_train.commands.explain import text_of

    typer.echo(text_of(found))


@app.command()
def sweep(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each a process with a device of its own where there are as many.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train many students from one cache, and rank them; exit code 1 if a run failed."""
    loaded = load_recipe(recipe, overrides or [], SweepRecipe)
    from student_train.commands.sweep import markdown
    from student_train.commands.sweep import sweep as train

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs too
    report = train(loaded, jobs)
    typer.echo(json.dumps(report) if as_json else f"\n{markdown(report)}")
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
    from student_train.commands.plan import PlanRecipe, planned_recipe
    from student_train.commands.plan import plan as look

    loaded = load_recipe(recipe, overrides or [], PlanRecipe)
    if write is not None:
        check_target(write)
    choices = look(loaded, evaluation)
    if write is not None:
        import yaml

        write.write_text(yaml.safe_dump(planned_recipe(loaded, choices), sort_keys=False))
    if as_json:
        typer.echo(json.dumps([{"place": c.place, "value": c.value, "why": c.why} for c in choices]))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("place", "value", "why")
    for choice in choices:
        shown = "off" if choice.value is None else "on" if choice.value == {} else json.dumps(choice.value)
        table.add_row(choice.place, escape(shown), escape(choice.why))
    Console().print(table)


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
    from student_train.commands.fidelity import fidelity_report

    found = fidelity_report(student, tuple(cache), max_tokens, bf16=bf16)
    if as_json:
        typer.echo(json.dumps(found))
        return
    cka = found.pop("cka")
    for name, value in [
        *found.items(),
        *((f"CKA of teacher's block / student's at its depth, {pair}", mean) for pair, mean in cka.items()),
    ]:
        typer.echo(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.4f}")


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
    from student_train.commands.generate import generate as write

    check_target(out)
    if out.exists():
        raise InputError("there is something at this place", expected="a new file", found=out, where="--out")
    found = write(
        student, cache, out, samples=samples, new_tokens=new_tokens, temperature=temperature, seed=seed, unfinished=unfinished
    )
    typer.echo("  ".join(f"{name}: {count}" for name, count in found.items()))
    if found["special"]:
        typer.echo("some texts hold special tokens: give their source `special_tokens: tokens`", err=True)


@app.command("show-weights")
def show_weights(
    cache: Annotated[str, typer.Argument(help="A cache with tags.", metavar="CACHE")],
    segment: Annotated[int, typer.Option(help="Number of the segment.")] = 0,
    rules: Annotated[Path | None, typer.Option(help="YAML on top of the shipped rules.")] = None,
    surface: Annotated[Path | None, typer.Option(help="Also draw the weight over impact and confidence, as a picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a segment's text coloured by the importance of its tokens: blue 0.2, grey 1, red 3."""
    from signal_store.cache import open_cache
    from student_train.importance.rules import load_rules
    from student_train.importance.show import coloured, save_surface, token_weights

    loaded = load_rules(rules)
    opened = open_cache(cache)
    if not -len(opened) <= segment < len(opened):
        raise InputError("no such segment", expected=f"0 to {len(opened) - 1}", found=segment, where=cache)
    tokens = token_weights(opened, segment, loaded)
    if surface is not None:
        save_surface(loaded, surface)
    if as_json:
        typer.echo(json.dumps([{"text": t.text, "weight": t.weight, "roles": t.roles} for t in tokens]))
        return
    from rich.console import Console

    Console().print(coloured(tokens))


@app.command("plot-shares")
def plot_shares(
    run: Annotated[Path, typer.Argument(help="Folder of a run with gradient_shares_every.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("gradient_shares.png"),
) -> None:
    """Draw each term's share of the gradient over the steps of a run."""
    from student_train.evaluate.gradient_shares import save_shares

    save_shares(run, out)
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
    from student_train.view.report import report as write

    check_target(html)
    html.write_text(write(runs, students=students), encoding="utf-8", errors="replace")
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
    from dataclasses import asdict

    from signal_view.summary import printable
    from student_train.commands.spikes import finite
    from student_train.commands.spikes import spikes as look

    found = look(run, most, suspects)
    if as_json:
        facts = [asdict(spike) | {"loss": finite(spike.loss), "usual": finite(spike.usual)} for spike in found]
        typer.echo(json.dumps(facts))
        return
    if not found:
        typer.echo("no spike: no step's loss lies far above the steps before it")
    for spike in found:
        typer.echo(f"step {spike.step}: loss {spike.loss:.4f}, before it {spike.usual:.4f}")
        for s in spike.suspects:
            surprise = "" if s.surprise is None else f", teacher's surprise {s.surprise:.2f} nats"
            typer.echo(
                f"  segment {s.segment} ({printable(s.source)}, document {s.document}, {s.tokens} tokens{surprise}): {s.text}"
            )


def main() -> None:
    """Entry point."""
    run_app(app, extra="student")


if __name__ == "__main__":
    main()
