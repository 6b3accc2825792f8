"""taps: where each tap of each block lies in a model."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from teacher_cache.options import AsJson


def command(
    model: Annotated[str, typer.Argument(help="Causal LM folder or hub name.", metavar="MODEL")],
    weights: Annotated[bool, typer.Option(help="Load the weights; without, the model is built from its config.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print where each tap of each block lies in a model, and what does not exist there."""
    from teacher_cache.commands.taps.table import tap_rows

    rows = tap_rows(model, weights=weights)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    for row in rows:
        typer.echo(f"{row.layer:>3}  {row.tap:<17} {row.place}")
