"""The progress bar of all long work: what, how far, how fast, how long still. On standard error, so that output stays clean."""

import sys
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        digits = 0 if speed is None or speed >= 10 else 2
        return Text("" if speed is None else f"{speed:,.{digits}f} {task.fields.get('unit', 'it')}/s")


class _Times(ProgressColumn):
    def render(self, task: Task) -> Text:
        gone, left = timedelta(seconds=int(task.elapsed or 0)), task.time_remaining
        if task.finished:
            return Text(f"in {timedelta(seconds=int(task.finished_time or 0))}")
        return Text(f"{gone} so far" if left is None else f"{gone} so far, {timedelta(seconds=int(left))} left")


def tell(line: str) -> None:
    """One line on standard error, where the bars are, for what a user should know and need not answer."""
    print(" ".join(line.split()), file=sys.stderr)  # noqa: T201  (a person should see it before the work begins)


def progress_bar() -> Progress:
    """A rich progress display; tasks name their `unit` as a field."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        _Rate(),
        _Times(),
    )
    return Progress(*columns, console=Console(file=sys.stderr))
