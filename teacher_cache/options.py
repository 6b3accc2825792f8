"""Arguments, options and answers that several commands of `teacher-cache` share."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from run_kit.cores import usable_cores
from teacher_cache.worker import Worker

if TYPE_CHECKING:
    from signal_store.manifest import SourceIdentity

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


def worker_of(text: str | None, processes: int | None) -> Worker:
    """The worker that the options name, or that this process's launcher does."""
    worker = Worker.from_environment() if text is None else Worker.parse(text)
    return replace(worker, processes=processes or usable_cores())


def say(facts: dict[str, object], as_json: bool) -> None:
    """Print a result: in one line, or as JSON."""
    typer.echo(json.dumps(facts) if as_json else "  ".join(f"{key}: {value}" for key, value in facts.items()))


def tokens_by_name(sources: Sequence["SourceIdentity"]) -> dict[str, int]:
    """Tokens of each source, over all generations."""
    found: Counter[str] = Counter()
    for source in sources:
        found[source.name] += source.num_tokens
    return dict(found)
