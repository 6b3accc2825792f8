"""The command line `teacher-cache`: every file or folder of `commands` is a command of its name. Verbs import what they need when
they run, so that `--help` does not import torch."""

import typer

from run_kit.command_line import add_commands, run_app
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
HELP = "Write down once what a teacher says of texts; keep, check and repair it."
app = typer.Typer(no_args_is_help=True, add_completion=False, help=HELP, pretty_exceptions_enable=False)
add_commands(app, commands, ORDER)


def main() -> None:
    """Entry point."""
    run_app(app, extra="teacher")


if __name__ == "__main__":
    main()
