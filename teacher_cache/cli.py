"""The command line `teacher-cache`. Verbs import what they need when they run, so that `--help` does not import torch."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from run_kit.command_line import check_target, run_app
from run_kit.recipe_file import load_recipe
from signal_store.errors import InputError
from signal_store.manifest import SourceIdentity
from teacher_cache.recipe import CacheRecipe

if TYPE_CHECKING:
    from signal_store.cache import Cache
    from teacher_cache.builder.workers import Worker

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe in YAML.", metavar="RECIPE.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, such as signals.distribution.head=32.", metavar="[KEY=VALUE]...")
]
CacheAddress = Annotated[str, typer.Argument(help="Folder, s3:// or https:// address of the cache.", metavar="CACHE")]
CacheAddresses = Annotated[list[str], typer.Argument(help="The cache; overlays of it may follow.", metavar="CACHE [OVERLAY]...")]
WorkerOption = Annotated[
    str | None, typer.Option("--worker", help="i/n: this is worker i of n, from 0. Under torchrun or Slurm it is read from there.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Processes that plan; one for each core that this may use, if not given."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _worker(text: str | None, processes: int | None) -> "Worker":
    from run_kit.cores import usable_cores
    from teacher_cache.builder.workers import Worker

    worker = Worker.from_environment() if text is None else Worker.parse(text)
    return replace(worker, processes=processes or usable_cores())


def _say(facts: dict[str, object], as_json: bool) -> None:
    typer.echo(json.dumps(facts) if as_json else "  ".join(f"{key}: {value}" for key, value in facts.items()))


@app.command()
def build(recipe: RecipeArgument, overrides: Overrides = None, processes: ProcessesOption = None, as_json: AsJson = False) -> None:
    """Plan, calibrate, fill and seal; go on where it stopped."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.commands.build import build as run
    from teacher_cache.commands.status import find_status

    before = find_status(loaded.cache)
    cache = run(loaded, _worker(None, processes))
    if before is not None and before.stage == "sealed":
        typer.echo("sealed before: no text was read, nothing was computed. New text is for extend, damage for repair.", err=True)
    _say(
        {"cache": cache.uri, "cache_id": cache.manifest.cache_id, "segments": len(cache), "units": cache.seal.num_units},
        as_json,
    )


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None, processes: ProcessesOption = None, as_json: AsJson = False) -> None:
    """Tokenize, cut segments, fix positions and units."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.builder.plan import plan as run

    made = run(loaded, _worker("0/1", processes))
    facts: dict[str, object] = {"plan": made.digest, "units": made.num_units, "tokens": tokens_by_name(made.sources)}
    skipped = {source.name: source.num_skipped_rows for source in made.sources if source.num_skipped_rows}
    _say(facts | ({"skipped_rows": skipped} if skipped else {}), as_json)


@app.command()
def calibrate(
    recipe: RecipeArgument, overrides: Overrides = None, processes: ProcessesOption = None, as_json: AsJson = False
) -> None:
    """Run the teacher on a few thousand tokens; freeze basis, rank, heads, steps and the manifest."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.builder.calibrate import calibrate as run

    manifest = run(loaded, _worker("0/1", processes)).manifest
    _say({"cache_id": manifest.cache_id, "tail_rank": manifest.calibration.tail_rank, "forward": manifest.plan.forward}, as_json)


@app.command()
def fill(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    worker: WorkerOption = None,
    processes: ProcessesOption = None,
    as_json: AsJson = False,
) -> None:
    """Run the teacher over every unit that has no record yet; any number of workers may."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.builder.fill import fill as run

    done = run(loaded, _worker(worker, processes))
    _say({"cache_id": done.manifest.cache_id, "units": done.plan.num_units}, as_json)


@app.command()
def seal(cache: CacheAddress, as_json: AsJson = False) -> None:
    """Publish, pack the records, write metadata and the seal."""
    from teacher_cache.builder.seal import seal as run

    made = run(cache)
    _say({"cache_id": made.cache_id, "generation": made.generation, "content": made.content_digest}, as_json)


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not load the teacher; print a range.")] = False,
    processes: ProcessesOption = None,
    as_json: AsJson = False,
) -> None:
    """Say what the cache will cost: bytes, objects, FLOPs, hours, memory. Plan and calibration are kept."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.commands.estimate import estimate as run
    from teacher_cache.commands.status import duration

    found = run(loaded, quick=quick, worker=_worker("0/1", processes))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return

    def span(low: float, high: float, unit: str) -> str:
        return f"{low:,.1f} {unit}" if low == high else f"{low:,.1f} to {high:,.1f} {unit}"

    typer.echo(f"tokens        {found.tokens:,} in {found.units:,} units")
    for name, (low, high) in sorted(found.bytes_per_token.items()):
        typer.echo(f"{name:<14}{span(low, high, 'bytes/token')}")
    typer.echo(f"total         {span(found.total_bytes[0] / 2**20, found.total_bytes[1] / 2**20, 'MiB')}")
    typer.echo(f"teacher       {found.teacher_flops:.3g} FLOP, and {found.calibration_flops:.3g} of calibration")
    if found.tokens_per_second is not None and found.hours is not None and found.worker_bytes is not None:
        typer.echo(f"objects       {found.objects:,}")
        typer.echo(f"this machine  {found.tokens_per_second:,.0f} tokens/s, {duration(3600 * found.hours)} alone")
        typer.echo(f"memory        {found.worker_bytes / 2**30:,.2f} GiB a worker (measured on {found.encoded_segments} segments)")
    else:
        typer.echo("Nothing was encoded: a range, and no hours. Without --quick the teacher encodes some segments first.")


@app.command()
def extend(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    worker: WorkerOption = None,
    processes: ProcessesOption = None,
    as_json: AsJson = False,
) -> None:
    """Append new documents to a sealed cache as its next generation."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.commands.extend import extend as run

    cache = run(loaded, _worker(worker, processes))
    _say({"cache_id": cache.manifest.cache_id, "generation": cache.seal.generation, "units": cache.seal.num_units}, as_json)


@app.command()
def verify(cache: CacheAddress, as_json: AsJson = False) -> None:
    """Re-read everything and name each object that is not what was committed; exit code 1 if there is one."""
    from teacher_cache.commands.verify import verify as run

    found = run(cache)
    if not as_json:
        for damage in found.damages:
            typer.echo(f"{damage.key}: {damage.what}")
        if not found.listed:
            typer.echo("this store cannot be listed: objects that do not belong were not looked for")
    facts: dict[str, object] = {"objects": found.num_objects, "bytes": found.num_bytes, "damaged": len(found.damages)}
    if as_json:
        facts |= {"listed": found.listed, "damages": [asdict(damage) for damage in found.damages]}
    _say(facts, as_json)
    if found.damages:
        raise typer.Exit(1)


@app.command()
def repair(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Mend what `verify` finds: compute damaged units anew, restore the rest."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.commands.repair import repair as run

    done = run(loaded)
    facts: dict[str, object] = {
        "restored": len(done.restored),
        "computed_units": list(done.computed_units),
        "revised_units": list(done.revised_units),
        "removed": len(done.removed),
    }
    _say(facts, as_json)


@app.command()
def taps(
    model: Annotated[str, typer.Argument(help="Causal LM folder or hub name.", metavar="MODEL")],
    weights: Annotated[bool, typer.Option(help="Load the weights; without, the model is built from its config.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print where each tap of each block lies in a model, and what does not exist there."""
    from teacher_cache.commands.taps import tap_rows

    rows = tap_rows(model, weights=weights)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    for row in rows:
        typer.echo(f"{row.layer:>3}  {row.tap:<17} {row.place}")


@app.command()
def inspect(
    cache: CacheAddresses,
    segment: Annotated[int | None, typer.Option(help="Show this segment's text under the teacher's surprise.")] = None,
    token: Annotated[int | None, typer.Option(help="With --segment: what the teacher expected after this token.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots and samples; of an unsealed cache, its progress.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a sealed cache holds, alone or with its overlays. Without options, torch is not imported."""
    if token is not None and segment is None:
        raise InputError("a token is one of a segment", expected="--segment too", where="--token")
    if html is not None and segment is not None:
        raise InputError("a page shows samples of its own", expected="--html or --segment", found="both", where="inspect")
    if html is not None:
        from teacher_cache.commands.inspect_page import inspect_page

        check_target(html)
        html.write_text(inspect_page(cache), encoding="utf-8", errors="replace")
        _say({"page": str(html)}, as_json)
        return
    from signal_store.cache import open_cache

    opened = open_cache(cache)
    if segment is not None:
        _inspect_segment(opened, segment, token, as_json)
        return
    manifest = opened.manifest
    temperatures = [f"{t:g}" for t in manifest.signals.distribution.temperatures] if manifest.signals.distribution else []
    facts: dict[str, object] = {
        "cache_id": manifest.cache_id,
        "teacher": manifest.teacher.name,
        "units": opened.seal.num_units,
        "segments": len(opened),
        "generation": opened.seal.generation,
        "tokens": tokens_by_name(opened.sources),
        "tail_rank": manifest.calibration.tail_rank,
        "coverage": dict(zip(temperatures, manifest.calibration.coverage, strict=True)),
        "arrays": sorted(opened.capacity_rows),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    from signal_view.summary import summarise, text_of

    typer.echo(text_of(summarise(opened)))


def _inspect_segment(cache: "Cache", number: int, token: int | None, as_json: bool) -> None:
    from rich.console import Console

    from signal_view import CacheView
    from teacher_cache.commands.inspect_segment import segment_facts, segment_of, segment_text, token_facts, token_table

    segment = segment_of(CacheView.of(cache), number)
    if as_json:
        typer.echo(json.dumps(segment_facts(segment) if token is None else token_facts(segment, token), ensure_ascii=False))
        return
    Console().print(segment_text(segment) if token is None else token_table(token_facts(segment, token)))


@app.command()
def status(
    cache: CacheAddress,
    watch: Annotated[float | None, typer.Option(min=0.5, help="Look again every so many seconds, until it is sealed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far a cache is, from any machine that sees it: units done, rate, time left, each worker, the last error."""
    from teacher_cache.commands.status import shown
    from teacher_cache.commands.status import status as look

    if as_json and watch is not None:
        raise InputError("--watch draws on the terminal", expected="--json or --watch", found="both", where="status")
    found = look(cache)
    if as_json:
        facts = (
            asdict(found)
            | {"workers": [note.model_dump() for note in found.workers]}
            | {name: getattr(found, name) for name in ("done_units", "done_tokens", "tokens_per_second", "seconds_left")}
        )
        error = found.last_error
        typer.echo(json.dumps(facts | {"last_error": None if error is None else error.error}))
        return
    from rich.console import Console

    if watch is None:
        Console().print(shown(found))
        return
    from rich.live import Live

    with Live(shown(found), console=Console()) as live:
        while found.stage != "sealed":
            time.sleep(watch)
            found = look(cache)
            live.update(shown(found))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where caches and runs will be.")] = Path(),
    model: Annotated[
        str | None, typer.Option(help="Also build a tiny cache of this model, signal by signal: folder or hub name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, extras, processors, attention, memory, disk; exit code 1 if something will fail."""
    from run_kit.environment import checks, say

    found = checks(folder, model)
    if model is not None and not any(check.name == "model" and check.state == "bad" for check in found):
        from teacher_cache.commands.model_check import signal_checks

        found += signal_checks(model)
    say(found, as_json=as_json)


def tokens_by_name(sources: Sequence[SourceIdentity]) -> dict[str, int]:
    """Tokens of each source, over all generations."""
    found: Counter[str] = Counter()
    for source in sources:
        found[source.name] += source.num_tokens
    return dict(found)


def main() -> None:
    """Entry point."""
    run_app(app, extra="teacher")


if __name__ == "__main__":
    main()
