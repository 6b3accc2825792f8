"""matplotlib, where it is installed."""

from typing import Any

from signal_store.errors import InputError


def pyplot() -> Any:
    """`matplotlib.pyplot`; InputError where matplotlib is not installed."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise InputError("matplotlib is not installed", expected='pip install "teacher-cache[inspect]"', where="plots") from error
    return plt
