"""inspect: say what a sealed cache holds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from run_kit.command_line import check_target
from signal_store.errors import InputError
from teacher_cache.options import AsJson, CacheAddresses, say, tokens_by_name

if TYPE_CHECKING:
    from signal_store.cache import Cache


def command(
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
        from teacher_cache.commands.inspect.page import inspect_page

        check_target(html)
        html.write_text(inspect_page(cache), encoding="utf-8", errors="replace")
        say({"page": str(html)}, as_json)
        return
    from signal_store.cache import open_cache

    opened = open_cache(cache)
    if segment is not None:
        _print_segment(opened, segment, token, as_json)
    elif as_json:
        typer.echo(json.dumps(_facts(opened)))
    else:
        from signal_view.summary import summarise, text_of

        typer.echo(text_of(summarise(opened)))


def _facts(cache: "Cache") -> dict[str, object]:
    manifest = cache.manifest
    temperatures = [f"{t:g}" for t in manifest.signals.distribution.temperatures] if manifest.signals.distribution else []
    return {
        "cache_id": manifest.cache_id,
        "teacher": manifest.teacher.name,
        "units": cache.seal.num_units,
        "segments": len(cache),
        "generation": cache.seal.generation,
        "tokens": tokens_by_name(cache.sources),
        "tail_rank": manifest.calibration.tail_rank,
        "coverage": dict(zip(temperatures, manifest.calibration.coverage, strict=True)),
        "arrays": sorted(cache.capacity_rows),
    }


def _print_segment(cache: "Cache", number: int, token: int | None, as_json: bool) -> None:
    from rich.console import Console

    from signal_view import CacheView
    from teacher_cache.commands.inspect.segment import segment_facts, segment_of, segment_text, token_facts, token_table

    segment = segment_of(CacheView.of(cache), number)
    if as_json:
        typer.echo(json.dumps(segment_facts(segment) if token is None else token_facts(segment, token), ensure_ascii=False))
        return
    Console().print(segment_text(segment) if token is None else token_table(token_facts(segment, token)))
