"""status: how far a cache is, from any machine that sees it, before and after it is sealed."""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from signal_store.errors import InputError
from teacher_cache.options import AsJson, CacheAddress

if TYPE_CHECKING:
    from rich.console import Group

    from teacher_cache.builder.status import Status

WIDTH = 60


def status(uri: str) -> "Status":
    """How far the cache at a place is. NotFoundError where no plan is; StorageError where the place cannot be listed."""
    from signal_store.io.objects import objects_at
    from teacher_cache.builder.status import read_status

    return read_status(objects_at(uri))


def shown(found: "Status") -> "Group":
    """For a terminal: a bar, a line, a row for each worker."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from signal_view.summary import printable
    from teacher_cache.builder.status import COLUMNS, line_of, worker_rows

    filled = round(WIDTH * found.done_tokens / max(1, sum(found.unit_tokens)))
    bar = Text("━" * filled, style="green").append("─" * (WIDTH - filled), style="dim")
    table = Table(*COLUMNS)
    for row in worker_rows(found):
        table.add_row(*(Text(printable(cell)) for cell in row))
    return Group(Text(line_of(found)), bar, *([table] if found.workers else []))


def command(
    cache: CacheAddress,
    watch: Annotated[float | None, typer.Option(min=0.5, help="Look again every so many seconds, until it is sealed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far a cache is, from any machine that sees it: units done, rate, time left, each worker, the last error."""
    if as_json and watch is not None:
        raise InputError("--watch draws on the terminal", expected="--json or --watch", found="both", where="status")
    found = status(cache)
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
    from rich.live import Live

    if watch is None:
        Console().print(shown(found))
        return
    with Live(shown(found), console=Console()) as live:
        while found.stage != "sealed":
            time.sleep(watch)
            found = status(cache)
            live.update(shown(found))
