"""estimate: what a cache will cost, before the long run. Plan and calibration stay in the cache and are not made again."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from run_kit.recipe_file import load_recipe
from teacher_cache.options import AsJson, Overrides, ProcessesOption, RecipeArgument, worker_of
from teacher_cache.recipe import CacheRecipe
from teacher_cache.worker import ALONE, Worker

if TYPE_CHECKING:
    from teacher_cache.builder.estimation import Estimate


def estimate(recipe: CacheRecipe, *, quick: bool = False, worker: Worker = ALONE) -> "Estimate":
    """The estimate of a recipe; StorageError, with the numbers, where the target disk cannot hold the least of it."""
    from teacher_cache.builder.estimation import estimate_of

    return estimate_of(recipe, worker, quick=quick)


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not load the teacher; print a range.")] = False,
    processes: ProcessesOption = None,
    as_json: AsJson = False,
) -> None:
    """Say what the cache will cost: bytes, objects, FLOPs, hours, memory. Plan and calibration are kept."""
    found = estimate(load_recipe(recipe, overrides or [], CacheRecipe), quick=quick, worker=worker_of("0/1", processes))
    typer.echo(json.dumps(asdict(found)) if as_json else text_of(found))


def text_of(found: "Estimate") -> str:
    """The figures for a terminal, one a line."""
    from teacher_cache.builder.status import duration

    def span(low: float, high: float, unit: str) -> str:
        return f"{low:,.1f} {unit}" if low == high else f"{low:,.1f} to {high:,.1f} {unit}"

    lines = [f"tokens        {found.tokens:,} in {found.units:,} units"]
    lines += [f"{name:<14}{span(low, high, 'bytes/token')}" for name, (low, high) in sorted(found.bytes_per_token.items())]
    lines.append(f"total         {span(found.total_bytes[0] / 2**20, found.total_bytes[1] / 2**20, 'MiB')}")
    lines.append(f"teacher       {found.teacher_flops:.3g} FLOP, and {found.calibration_flops:.3g} of calibration")
    if found.tokens_per_second is None or found.hours is None or found.worker_bytes is None:
        lines.append("Nothing was encoded: a range, and no hours. Without --quick the teacher encodes some segments first.")
    else:
        lines.append(f"objects       {found.objects:,}")
        lines.append(f"this machine  {found.tokens_per_second:,.0f} tokens/s, {duration(3600 * found.hours)} alone")
        lines.append(
            f"memory        {found.worker_bytes / 2**30:,.2f} GiB a worker (measured on {found.encoded_segments} segments)"
        )
    return "\n".join(lines)
