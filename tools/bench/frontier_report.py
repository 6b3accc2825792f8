"""Rows of the frontier: kept as they come, judged by the goals, shown as a table and a plot."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

TEMPERATURES = (1.0, 2.0, 3.0)
GOALS = {"standard": (1 / 2, {1.0: 1 / 5, 2.0: 1 / 20, 3.0: 1 / 20}), "lean": (1 / 3, {1.0: 1 / 2})}
"""Of DistillKit's recommended setting: the share of its bytes, and of its angle at a temperature."""


@dataclass(frozen=True)
class Row:
    """One method at one setting. Angles and T²·KL (none where a method gives no distribution) by temperature."""

    method: str
    setting: str
    bytes_per_token: float
    angle_degrees: dict[str, float]
    angle_error: dict[str, float]
    scaled_kl_nats: dict[str, float]
    parts: dict[str, float]


@dataclass
class Results:
    """Rows by key, kept in a file as they come."""

    path: Path
    rows: dict[str, list[Row]]

    @classmethod
    def at(cls, path: Path) -> "Results":
        """What a file holds, or nothing yet."""
        content = json.loads(path.read_text())["rows"] if path.exists() else {}
        return cls(path, {key: [Row(**row) for row in rows] for key, rows in content.items()})

    def get(self, key: str, make: Callable[[], list[Row]]) -> None:
        """Make these rows unless they are there."""
        if key not in self.rows:
            self.rows[key] = make()
            self.path.write_text(json.dumps({"rows": {k: [asdict(r) for r in v] for k, v in self.rows.items()}}) + "\n")

    @property
    def all(self) -> list[Row]:
        """Every row, in the order of its making."""
        return [row for rows in self.rows.values() for row in rows]


def goals(rows: list[Row]) -> dict[str, Any]:
    """Each named quality against DistillKit's recommended setting at its best mode, normalised or not: shares of bytes and of
    angles, and whether the goal is met."""
    peers = [row for row in rows if row.method == "DistillKit" and row.setting.startswith("recommended")]
    if not peers:
        return {}
    size = min(row.bytes_per_token for row in peers)
    best = {t: min(row.angle_degrees[f"{t:g}"] for row in peers) for t in TEMPERATURES}
    found: dict[str, Any] = {}
    for row in (row for row in rows if row.method == "quality"):
        shares = {f"{t:g}": row.angle_degrees[f"{t:g}"] / best[t] for t in TEMPERATURES}
        own: dict[str, Any] = {"bytes": row.bytes_per_token / size, "angles": shares}
        if (name := row.setting.split(",")[0]) in GOALS:
            bytes_share, angle_shares = GOALS[name]
            own["met"] = own["bytes"] <= bytes_share and all(shares[f"{t:g}"] <= share for t, share in angle_shares.items())
        found[name] = own
    return found


def print_table(rows: list[Row]) -> None:
    table = Table(title="bytes a token, T²·KL in nats, and angle in degrees of forward KL's gradient")
    for column in ("method", "setting", "bytes", *(f"T={t:g}: T²·KL, angle" for t in TEMPERATURES)):
        table.add_column(column, justify="left" if column in ("method", "setting") else "right")
    for row in sorted(rows, key=lambda row: (row.method, row.bytes_per_token)):
        cells = [f"{row.scaled_kl_nats.get(f'{t:g}', math.nan):.2g}  {row.angle_degrees[f'{t:g}']:.2g}°" for t in TEMPERATURES]
        table.add_row(row.method, row.setting, f"{row.bytes_per_token:.1f}", *cells)
    Console(width=140).print(table)


def plot(rows: list[Row], tail: list[dict[str, float]], title: str, path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TEMPERATURES) + 1, figsize=(20, 5))
    methods: dict[str, list[Row]] = {}
    for row in rows:
        name = f"DistillKit, {row.setting.rsplit(', ', 1)[1]}" if row.method == "DistillKit" else row.method
        methods.setdefault(name, []).append(row)
    for axis, t in zip(axes, TEMPERATURES, strict=False):
        for name, own in methods.items():
            own = sorted(own, key=lambda row: row.bytes_per_token)
            loose = name == "quality" or name.startswith("DistillKit")
            style = (
                {"marker": "*", "markersize": 14, "color": "black", "zorder": 5}
                if name == "quality"
                else {"marker": "o", "markersize": 4}
            )
            x, y = [row.bytes_per_token for row in own], [row.angle_degrees[f"{t:g}"] for row in own]
            axis.plot(x, y, linestyle="none" if loose else "-", label=name, **style)
            for row in own if name == "quality" else ():
                axis.annotate(
                    row.setting.split(",")[0],
                    (row.bytes_per_token, row.angle_degrees[f"{t:g}"]),
                    (5, 5),
                    textcoords="offset points",
                )
        axis.set(
            title=f"T = {t:g}", xlabel="bytes per token", ylabel="angle to the full gradient, degrees", xscale="log", yscale="log"
        )
        axis.set_xticks([50, 100, 200, 400], ["50", "100", "200", "400"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    for name in ("written", "entropy", "bound"):
        axes[-1].plot([row[name] for row in tail], [row["half_error"] for row in tail], marker="o", markersize=4, label=name)
    axes[-1].set(title="the tail alone", xlabel="bytes per token", ylabel="half the squared error of the logits", yscale="log")
    axes[-1].legend()
    axes[-1].grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
