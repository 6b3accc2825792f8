"""plot-shares: each term's share of the gradient over the steps of a run, as a picture."""

from pathlib import Path
from typing import Annotated

import typer


def plot_shares(run: Path, out: Path) -> None:
    """Draw them into a file.

    Raises:
        NotFoundError: if there is no run.
        InputError: if it has logged no shares.
    """
    from student_train.view.gradient_shares import plot_shares as plotted
    from student_train.view.gradient_shares import shares_of

    plotted(*shares_of(run)).figure.savefig(out, dpi=150)


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a run with gradient_shares_every.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("gradient_shares.png"),
) -> None:
    """Draw each term's share of the gradient over the steps of a run."""
    plot_shares(run, out)
    typer.echo(str(out))
