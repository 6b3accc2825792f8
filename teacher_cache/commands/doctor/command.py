"""doctor: check this machine, and what can be cached of a model."""

from pathlib import Path
from typing import Annotated

import typer

from teacher_cache.options import AsJson


def command(
    folder: Annotated[Path, typer.Option(help="Where caches and runs will be.")] = Path(),
    model: Annotated[
        str | None, typer.Option(help="Also build a tiny cache of this model, signal by signal: folder or hub name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, extras, processors, attention, memory, disk; exit code 1 if something will fail."""
    from run_kit.environment import checks, say

    found = checks(folder, model)
    if model is not None and not any(check.name == "model" and check.state == "bad" for check in found):
        from teacher_cache.commands.doctor.model_check import signal_checks

        found += signal_checks(model)
    say(found, as_json=as_json)
