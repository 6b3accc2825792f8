"""The command line `teacher-cache`: every file or folder of `commands` is a command of its name. Verbs import what they need when
they run, so that `--help` does not import torch."""

import importlib
import pkgutil
from collections.abc import Callable

import typer

from run_kit.command_line import run_app
from teacher_cache import commands

ORDER = (
    "build",
    "plan",
    "calibrate",
    "fill",
    "seal",
    "estimate",
    "extend",
    "verify",
    "repair",
    "taps",
    "inspect",
    "status",
    "doctor",
)
"""In which help shows them; others follow, by name."""


def command_of(name: str) -> Callable[..., None]:
    """What a file of `commands` exports as `command`; of a folder, its file `command` does."""
    package = f"{commands.__name__}.{name}"
    module = importlib.import_module(package)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{package}.command")
    found: Callable[..., None] = module.command
    return found


HELP = "Write down once what a teacher says of texts; keep, check and repair it."
app = typer.Typer(no_args_is_help=True, add_completion=False, help=HELP, pretty_exceptions_enable=False)
_further = sorted({module.name for module in pkgutil.iter_modules(commands.__path__)} - set(ORDER))
for _name in (*ORDER, *_further):
    app.command(_name)(command_of(_name))


def main() -> None:
    """Entry point."""
    run_app(app, extra="teacher")


if __name__ == "__main__":
    main()
