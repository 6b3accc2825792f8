"""What both command lines share: one line for a user's mistake, or for an extra that is not installed, and exit code 2; never a
traceback for it."""

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from run_kit.allocator import keep_freed_memory as keep_freed_memory
from signal_store.errors import NotFoundError, SignalStoreError, memory_error, path_error, storage_error

EXIT_WRONG_INPUT = 2
PROJECT = "teacher-cache"


def run_app(app: typer.Typer, extra: str) -> None:
    """Run a typer application with `--version` and our exit codes. `extra` is the one that most of its commands need."""
    app.callback()(_options)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    keep_freed_memory()
    guarded(app, extra)


def add_commands(app: typer.Typer, package: ModuleType, order: Sequence[str]) -> None:
    """Every file or folder of a package becomes a command of its name: those of `order` first, others by name. A file exports it as
    `command`: a function, or an application of its own where there are further words; a folder does so in its file `command`."""
    names = {module.name for module in pkgutil.iter_modules(package.__path__)}
    for name in (*order, *sorted(names - set(order))):
        module = importlib.import_module(f"{package.__name__}.{name}")
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{module.__name__}.command")
        shown = name.replace("_", "-")
        if isinstance(module.command, typer.Typer):
            app.add_typer(module.command, name=shown)
        else:
            app.command(shown)(module.command)


def guarded(command: Callable[[], None], extra: str = "all") -> None:
    """Run a command; print a SignalStoreError as one line on standard error and exit with 2."""
    try:
        command()
    except ModuleNotFoundError as error:
        from run_kit.requirements import missing_package

        if (lacking := missing_package(error, extra)) is None:
            raise
        _stop(str(lacking))
    except SignalStoreError as error:
        _stop(str(error))
    except OSError as error:
        known = storage_error(error, error.filename) or path_error(error)
        if known is None:
            raise
        _stop(str(known))
    except (MemoryError, RuntimeError) as error:
        scarce = memory_error(error)
        if scarce is None:
            raise
        _stop(str(scarce))


def check_target(target: Path) -> None:
    """Where a file is to be written, before the work and not after: NotFoundError if its folder is not there, InputError if that is
    a cache's."""
    from signal_store.ledger.documents import refuse_inside_a_cache  # which imports zarr

    refuse_inside_a_cache(target)
    if not target.absolute().parent.is_dir():
        raise NotFoundError("no folder to write into", expected="one that is there", found=target.absolute().parent, where=target)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROJECT} {metadata.version(PROJECT)}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and stop.")
    ] = False,
) -> None:
    """What comes before a command."""


def _stop(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201  (an error is for the terminal)
    raise SystemExit(EXIT_WRONG_INPUT)
