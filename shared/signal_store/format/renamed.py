"""Names that recipes used before. Each is read for one version more; whoever uses one is told once a process, in one line."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any

_tells: ContextVar[bool] = ContextVar("tells", default=True)


def current_name(name: str, renamed: Mapping[str, str], where: str) -> str:
    """The name that stands for one of before; any other as it is.

    Args:
        name: as a recipe gives it.
        renamed: by name of before, today's.
        where: the part of the recipe, for the line of notice.
    """
    if name not in renamed:
        return name
    if _tells.get():
        _tell(f"{where}: {name} is called {renamed[name]} now")
    return renamed[name]


def by_current_names(content: Mapping[str, Any], renamed: Mapping[str, str], where: str) -> dict[str, Any]:
    """The same values under today's names. ValueError where one is given under both."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        own = current_name(name, renamed, where)
        if own in found:
            raise ValueError(f"{own} is given twice, by two names")
        found[own] = value
    return found


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Nothing is said of names inside: what is read there, a program wrote down."""
    token = _tells.set(False)
    try:
        yield
    finally:
        _tells.reset(token)


@cache
def _tell(line: str) -> None:
    """Print a line, once a process."""
    print(line, file=sys.stderr)  # noqa: T201  (a person should see it while both names are known)
