"""The libraries of the extra `inspect`, where they are installed."""

import importlib
from typing import Any

from signal_store.errors import InputError


def pyplot() -> Any:
    """`matplotlib.pyplot`; InputError where matplotlib is not installed."""
    return _extra("matplotlib.pyplot")


def xarray() -> Any:
    """`xarray`; InputError where it is not installed."""
    return _extra("xarray")


def pandas() -> Any:
    """`pandas`; InputError where it is not installed."""
    return _extra("pandas")


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(f"{package} is not installed", expected='pip install "teacher-cache[inspect]"', where=package) from error
