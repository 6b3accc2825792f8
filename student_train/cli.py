"""The command line `student-train`: every file or folder of `commands` is a command of its name. Verbs import what they need when
they run, so that `--help` does not import torch."""

import typer

from run_kit.command_line import add_commands, run_app
from student_train import commands

ORDER = ("run", "explain", "sweep", "plan", "fidelity", "generate", "align", "show_weights", "plot_shares", "report", "doctor")
"""In which help shows them; others follow, by name."""
HELP = "Train students from a sealed cache, with no teacher in memory; measure and show what they have kept."
app = typer.Typer(no_args_is_help=True, add_completion=False, help=HELP, pretty_exceptions_enable=False)
add_commands(app, commands, ORDER)


def main() -> None:
    """Entry point."""
    run_app(app, extra="student")


if __name__ == "__main__":
    main()
