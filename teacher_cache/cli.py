"""The command line `teacher-cache`. Verbs import what they need when they run, so that `--help` does not import torch."""

import json
from pathlib import Path
from typing import Annotated

import typer

from signal_store.command_line import run_app
from signal_store.recipe_file import load_recipe
from teacher_cache.recipe import CacheRecipe

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe in YAML.", metavar="RECIPE.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, such as signals.distribution.head=32.", metavar="[KEY=VALUE]...")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _say(facts: dict[str, object], as_json: bool) -> None:
    typer.echo(json.dumps(facts) if as_json else "  ".join(f"{key}: {value}" for key, value in facts.items()))


@app.command()
def build(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Plan, calibrate, fill and seal; go on where it stopped."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.build import build as run

    cache = run(loaded)
    _say(
        {"cache": str(cache.root), "cache_id": cache.manifest.cache_id, "segments": len(cache), "units": cache.seal.num_units},
        as_json,
    )


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tokenize, cut segments, fix positions and units."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.plan import plan as run

    made = run(loaded)
    tokens = {source.name: source.num_tokens for source in made.sources}
    _say({"plan": made.digest, "units": made.num_units, "tokens": tokens}, as_json)


@app.command()
def calibrate(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run the teacher on a few thousand tokens; freeze basis, rank, heads, steps and the manifest."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.calibrate import calibrate as run

    manifest = run(loaded).manifest
    _say({"cache_id": manifest.cache_id, "tail_rank": manifest.calibration.tail_rank, "forward": manifest.plan.forward}, as_json)


@app.command()
def fill(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run the teacher over every unit that has no record yet."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.fill import fill as run

    done = run(loaded)
    _say({"cache_id": done.manifest.cache_id, "units": done.plan.num_units}, as_json)


@app.command()
def seal(cache: Annotated[Path, typer.Argument(help="Folder of the cache.")], as_json: AsJson = False) -> None:
    """Publish, pack the records, write metadata and the seal."""
    from teacher_cache.seal import seal as run

    made = run(cache)
    _say({"cache_id": made.cache_id, "generation": made.generation, "content": made.content_digest}, as_json)


@app.command()
def inspect(cache: Annotated[Path, typer.Argument(help="Folder of the cache.")], as_json: AsJson = False) -> None:
    """Say what a sealed cache holds, without importing torch."""
    from signal_store.cache import open_cache

    opened = open_cache(cache)
    manifest = opened.manifest
    _say(
        {
            "cache_id": manifest.cache_id,
            "teacher": manifest.teacher.name,
            "units": opened.seal.num_units,
            "segments": len(opened),
            "tokens": {source.name: source.num_tokens for source in manifest.sources},
            "tail_rank": manifest.calibration.tail_rank,
            "arrays": [spec.path for spec in manifest.specs],
        },
        as_json,
    )


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
