"""report: one page that compares runs."""

from collections.abc import Sequence
from pathlib import Path

from run_kit.command_line import check_target
from student_train.view.report import report as page


def report(runs: Sequence[Path], html: Path, *, students: bool = False) -> None:
    """Write the page of these runs, or of all runs below these folders; `students`: load the finished ones, and show them beside
    their teacher.

    Raises:
        NotFoundError: if there is no run, or no folder to write into.
    """
    check_target(html)
    html.write_text(page(runs, students=students), encoding="utf-8", errors="replace")
