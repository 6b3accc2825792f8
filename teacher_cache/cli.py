"""The command line `teacher-cache`. Verbs import what they need when they run, so that `--help` does not import torch."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from run_kit.command_line import run_app
from run_kit.recipe_file import load_recipe
from teacher_cache.commands import build, calibrate, extend, fill, plan, repair, seal, status, verify
from teacher_cache.commands.doctor import command as doctor
from teacher_cache.commands.inspect import command as inspect
from teacher_cache.commands.taps import command as taps
from teacher_cache.options import AsJson, Overrides, ProcessesOption, RecipeArgument, worker_of
from teacher_cache.recipe import CacheRecipe

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not load the teacher; print a range.")] = False,
    processes: ProcessesOption = None,
    as_json: AsJson = False,
) -> None:
    """Say what the cache will cost: bytes, objects, FLOPs, hours, memory. Plan and calibration are kept."""
    loaded = load_recipe(recipe, overrides or [], CacheRecipe)
    from teacher_cache.builder.status import duration
    from teacher_cache.commands.estimate import estimate as run

    found = run(loaded, quick=quick, worker=worker_of("0/1", processes))
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


COMMANDS: dict[str, Callable[..., None]] = {
    "build": build.command,
    "plan": plan.command,
    "calibrate": calibrate.command,
    "fill": fill.command,
    "seal": seal.command,
    "estimate": estimate,
    "extend": extend.command,
    "verify": verify.command,
    "repair": repair.command,
    "taps": taps.command,
    "inspect": inspect.command,
    "status": status.command,
    "doctor": doctor.command,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry point."""
    run_app(app, extra="teacher")


if __name__ == "__main__":
    main()
