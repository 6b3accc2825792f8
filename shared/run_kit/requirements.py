"""What the installed project says that it needs: its own packages, and those of each extra."""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from signal_store.errors import InputError

PROJECT = "teacher-cache"
EXTRAS = ("teacher", "student", "inspect", "gpu", "lora", "nlp", "remote", "tensorboard")
"""Those that a user may want; `all` is the first two."""


def required(extra: str | None = None) -> list[Requirement]:
    """What an extra brings, or, of None, what every installation has."""
    found = [Requirement(line) for line in requires(PROJECT) or []]
    if extra is None:
        return [r for r in found if r.marker is None]
    return [r for r in found if r.marker is not None and r.marker.evaluate({"extra": extra})]


def is_installed(package: str) -> bool:
    """Whether a distribution of this name is here."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def how_to_install(extra: str) -> str:
    """The command that brings an extra."""
    return f'pip install "{PROJECT}[{extra}]"'


def missing_package(error: ImportError, extra: str) -> InputError | None:
    """The error, in one line, for a module that `extra`, or another of the extras, brings and that is not here; None for any other:
    that is our mistake, or a broken installation."""
    module = (error.name or "").partition(".")[0]
    if not module or find_spec(module) is not None:
        return None
    bring = next((name for name in (extra, *EXTRAS) if module in _modules(name)), None)
    return None if bring is None else InputError(f"{module} is not installed", expected=how_to_install(bring), where=sys.prefix)


def _modules(extra: str) -> Iterator[str]:
    """Of its packages, by the usual rule; it holds for those that are imported without a check of their own."""
    try:
        found = required(extra)
    except PackageNotFoundError:  # the sources alone
        return
    yield from (canonicalize_name(r.name).replace("-", "_") for r in found)
