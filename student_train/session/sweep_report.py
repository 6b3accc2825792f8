"""The report of a sweep to look at: a table in Markdown, and a picture."""

from pathlib import Path
from typing import Any

from signal_view.extras import pyplot

SHOWN = ("validation_loss", "agreement", "kl", "calibration_error", "tokens_per_second")
"""Numbers of a result beside the one that the report ranks by."""


def markdown(report: dict[str, Any]) -> str:
    """The report as a table; ± is the standard deviation over seeds."""
    columns = list(dict.fromkeys([report["metric"], *SHOWN]))
    columns = [name for name in columns if any(name in group["mean"] for group in report["groups"])]
    spread = "; ± is the standard deviation over seeds" if any(group["sd"] for group in report["groups"]) else ""
    lines = [f"Ranked by {report['metric']}, {report['order']} first{spread}.", ""]
    lines += ["| | run | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for place, group in enumerate(report["groups"], start=1):
        cells = [_cell(group, name) for name in columns]
        lines.append(f"| {place} | {group['name']} | {group['runs']} | " + " | ".join(cells) + " |")
    lines += [f"\nFailed: {run['name']}, seed {run['seed']}: {run['error']}" for run in report["failed"]]
    return "\n".join(lines) + "\n"


def _cell(group: dict[str, Any], name: str) -> str:
    if name not in group["mean"]:
        return ""
    digits = ",.0f" if abs(group["mean"][name]) >= 100 else ".4f"
    spread = f" ± {group['sd'][name]:{digits}}" if name in group["sd"] else ""
    return f"{group['mean'][name]:{digits}}{spread}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Mean and spread of the metric by group, best at the top."""
    plt = pyplot()
    groups = [group for group in reversed(report["groups"]) if report["metric"] in group["mean"]]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * len(groups)), layout="constrained")
    means = [group["mean"][report["metric"]] for group in groups]
    spreads = [group["sd"].get(report["metric"], 0.0) for group in groups]
    axes.errorbar(means, range(len(groups)), xerr=spreads, fmt="o", capsize=3)
    axes.set_yticks(range(len(groups)), [group["name"] for group in groups])
    axes.set_xlabel(f"{report['metric']} (mean ± standard deviation over seeds)")
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
