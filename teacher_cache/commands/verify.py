"""verify: re-read everything a sealed cache consists of, and name each object that is not what was committed."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from teacher_cache.options import AsJson, CacheAddress, say

if TYPE_CHECKING:
    from teacher_cache.builder.verification import Verified


def verify(uri: str) -> "Verified":
    """Check the newest generation of a sealed cache; NotFoundError or CorruptError where not even manifest and seal can be read."""
    from signal_store.io.objects import objects_at
    from teacher_cache.builder.verification import check_objects

    return check_objects(objects_at(uri))


def command(cache: CacheAddress, as_json: AsJson = False) -> None:
    """Re-read everything and name each object that is not what was committed; exit code 1 if there is one."""
    found = verify(cache)
    if not as_json:
        for damage in found.damages:
            typer.echo(f"{damage.key}: {damage.what}")
        if not found.listed:
            typer.echo("this store cannot be listed: objects that do not belong were not looked for")
    facts: dict[str, object] = {"objects": found.num_objects, "bytes": found.num_bytes, "damaged": len(found.damages)}
    if as_json:
        facts |= {"listed": found.listed, "damages": [asdict(damage) for damage in found.damages]}
    say(facts, as_json)
    if found.damages:
        raise typer.Exit(1)
