"""Arguments and options that several commands of `student-train` share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe in YAML.", metavar="RECIPE.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as steps=200.", metavar="[KEY=VALUE]...")]
StudentFolder = Annotated[Path, typer.Argument(help="Folder of a student, such as OUT/student.", metavar="STUDENT")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

Result = TypeVar("Result")


def say(found: Result, text_of: Callable[[Result], Any], as_json: bool, facts_of: Callable[[Result], Any] | None = None) -> None:
    """Print a result: as `text_of` shows it, a text or what rich lays out; or as JSON, as `facts_of` makes it plain data."""
    if as_json:
        typer.echo(json.dumps(found if facts_of is None else facts_of(found)))
    elif isinstance(shown := text_of(found), str):
        typer.echo(shown)
    else:
        from rich.console import Console

        Console().print(shown)
