"""show-weights: a segment's text with the importance of its tokens."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from signal_store.errors import InputError
from student_train.options import AsJson, say

if TYPE_CHECKING:
    from student_train.importance.show import TokenWeight


def show_weights(cache: str, segment: int = 0, rules: Path | None = None, surface: Path | None = None) -> "list[TokenWeight]":
    """Weigh the tokens of a segment; `surface`: also draw the weight over impact and confidence, as a picture.

    Raises:
        InputError: if there is no such segment, or the rules do not hold.
        MismatchError: if the cache has no tags or no distribution.
    """
    from signal_store.cache import open_cache
    from student_train.importance.rules import load_rules
    from student_train.importance.show import save_surface, token_weights

    loaded = load_rules(rules)
    opened = open_cache(cache)
    if not -len(opened) <= segment < len(opened):
        raise InputError("no such segment", expected=f"0 to {len(opened) - 1}", found=segment, where=cache)
    tokens = token_weights(opened, segment, loaded)
    if surface is not None:
        save_surface(loaded, surface)
    return tokens


def command(
    cache: Annotated[str, typer.Argument(help="A cache with tags.", metavar="CACHE")],
    segment: Annotated[int, typer.Option(help="Number of the segment.")] = 0,
    rules: Annotated[Path | None, typer.Option(help="YAML on top of the shipped rules.")] = None,
    surface: Annotated[Path | None, typer.Option(help="Also draw the weight over impact and confidence, as a picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a segment's text coloured by the importance of its tokens: blue 0.2, grey 1, red 3."""
    tokens = show_weights(cache, segment, rules, surface)
    from student_train.importance.show import coloured

    say(tokens, coloured, as_json, lambda found: [asdict(token) for token in found])
