"""The name that was probably meant, for refusals that say it."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one that was probably meant, if any comes near."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)
