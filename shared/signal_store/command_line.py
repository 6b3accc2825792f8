"""What both command lines share: one line for a user's mistake and exit code 2; never a traceback for it."""

import os
import sys
from collections.abc import Callable

import typer

from signal_store.errors import SignalStoreError, storage_error

EXIT_WRONG_INPUT = 2


def run_app(app: typer.Typer) -> None:
    """Run a typer application with our exit codes."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    guarded(lambda: app())


def guarded(command: Callable[[], None]) -> None:
    """Run a command; print a SignalStoreError as one line on standard error and exit with 2."""
    try:
        command()
    except SignalStoreError as error:
        _stop(str(error))
    except OSError as error:
        known = storage_error(error, error.filename)
        if known is None:
            raise
        _stop(str(known))


def _stop(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201  (this is the one place that speaks to the terminal)
    raise SystemExit(EXIT_WRONG_INPUT)
