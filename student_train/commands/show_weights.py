"""show-weights: a segment's text with the importance of its tokens."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from signal_store.cache import open_cache
from signal_store.errors import InputError
from student_train.importance.rules import load_rules
from student_train.importance.show import TokenWeight, coloured, save_surface, token_weights


def show_weights(cache: str, segment: int = 0, rules: Path | None = None, surface: Path | None = None) -> list[TokenWeight]:
    """Weigh the tokens of a segment; `surface`: also draw the weight over impact and confidence, as a picture.

    Raises:
        InputError: if there is no such segment, or the rules do not hold.
        MismatchError: if the cache has no tags or no distribution.
    """
    loaded = load_rules(rules)
    opened = open_cache(cache)
    if not -len(opened) <= segment < len(opened):
        raise InputError("no such segment", expected=f"0 to {len(opened) - 1}", found=segment, where=cache)
    tokens = token_weights(opened, segment, loaded)
    if surface is not None:
        save_surface(loaded, surface)
    return tokens


def facts_of(tokens: list[TokenWeight]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(token) for token in tokens]


def text_of(tokens: list[TokenWeight]) -> Text:
    """For a terminal: from blue (0.2) through grey (1) to red (3)."""
    return coloured(tokens)
