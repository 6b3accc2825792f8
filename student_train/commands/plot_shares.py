"""plot-shares: each term's share of the gradient over the steps of a run, as a picture."""

from pathlib import Path

from student_train.view.gradient_shares import plot_shares as plotted
from student_train.view.gradient_shares import shares_of


def plot_shares(run: Path, out: Path) -> None:
    """Draw them into a file.

    Raises:
        NotFoundError: if there is no run.
        InputError: if it has logged no shares.
    """
    plotted(*shares_of(run)).figure.savefig(out, dpi=150)
