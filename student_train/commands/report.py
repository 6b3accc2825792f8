"""report: one page that compares runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from run_kit.command_line import check_target


def report(runs: Sequence[Path], html: Path, *, students: bool = False) -> None:
    """Write the page of these runs, or of all runs below these folders; `students`: load the finished ones, and show them beside
    their teacher.

    Raises:
        NotFoundError: if there is no run, or no folder to write into.
    """
    from student_train.view.report import report as page

    check_target(html)
    html.write_text(page(runs, students=students), encoding="utf-8", errors="replace")


def command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of many runs, such as a sweep's.", metavar="RUN...")],
    html: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    students: Annotated[
        bool, typer.Option("--students", help="Load the finished students, and show them beside their teacher.")
    ] = False,
) -> None:
    """Write one page that compares runs: results, recipes, curves, terms, gradient shares."""
    report(runs, html, students=students)
    typer.echo(str(html))
