"""Which term moves the student: the shares of the gradient's norm that a run has logged, as a picture."""

from pathlib import Path
from typing import Any

from signal_store.errors import InputError, NotFoundError
from signal_view.extras import pyplot
from student_train.evaluate.gradient_shares import SUFFIX
from student_train.train.metrics import METRICS, read_metrics


def shares_of(run: Path) -> tuple[list[int], dict[str, list[float]]]:
    """(steps, shares by term) of a run's log; InputError where it has none."""
    path = run / METRICS
    if not path.is_file():
        raise NotFoundError("no run here", expected=METRICS, where=run)
    records = [record for record in read_metrics(path) if any(name.endswith(SUFFIX) for name in record)]
    if not records:
        raise InputError("the run has no gradient shares", expected="gradient_shares_every in its recipe", where=run)
    names = list(dict.fromkeys(name for record in records for name in record if name.endswith(SUFFIX)))
    shares = {name.removesuffix(SUFFIX): [float(record.get(name, 0.0)) for record in records] for name in names}
    return [int(record["step"]) for record in records], shares


def plot_shares(steps: list[int], shares: dict[str, list[float]], axes: Any = None) -> Any:
    """Shares stacked over steps; returns the matplotlib Axes."""
    plt = pyplot()
    axes = axes or plt.subplots(figsize=(7, 4), layout="constrained")[1]
    axes.stackplot(steps, *shares.values(), labels=list(shares), colors=plt.get_cmap("tab20").colors)
    axes.set(
        xlabel="step",
        ylabel="share of the gradient norm",
        ylim=(0, 1),
        xlim=(min(steps), max(steps)),
        title="what moves the student",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, reverse=True)
    return axes
