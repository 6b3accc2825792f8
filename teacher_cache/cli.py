"""The command line `teacher-cache`. Verbs import what they need when they run, so that `--help` does not import torch."""

from collections.abc import Callable

import typer

from run_kit.command_line import run_app
from teacher_cache.commands import build, calibrate, estimate, extend, fill, plan, repair, seal, status, verify
from teacher_cache.commands.doctor import command as doctor
from teacher_cache.commands.inspect import command as inspect
from teacher_cache.commands.taps import command as taps

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)


COMMANDS: dict[str, Callable[..., None]] = {
    "build": build.command,
    "plan": plan.command,
    "calibrate": calibrate.command,
    "fill": fill.command,
    "seal": seal.command,
    "estimate": estimate.command,
    "extend": extend.command,
    "verify": verify.command,
    "repair": repair.command,
    "taps": taps.command,
    "inspect": inspect.command,
    "status": status.command,
    "doctor": doctor.command,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry point."""
    run_app(app, extra="teacher")


if __name__ == "__main__":
    main()
