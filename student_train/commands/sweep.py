"""sweep: many students from one cache, each a process of its own; a table that fills while they run, and a report ranked by a
metric.

Runs are resumable as any run is: the same command again goes on, and leaves alone what is finished. A run that fails is shown with
its last line of error, and the others go on.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from run_kit.executor import Executor, Job, LocalExecutor
from signal_store.ledger.documents import refuse_inside_a_cache
from signal_view.extras import pyplot
from student_train.sweep_recipe import PlannedRun, SweepRecipe, planned_runs
from student_train.train.claim import Claim, refuse_strangers
from student_train.train.metrics import METRICS

POLL_SECONDS = 0.5
REPORTS = ("report.json", "report.md", "report.png")
SHOWN = ("validation_loss", "agreement", "kl", "calibration_error", "tokens_per_second")


@dataclass(slots=True)
class Running:
    """A run and where it stands: waiting, running, done or failed."""

    planned: PlannedRun
    state: str = "waiting"
    error: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    _job: Job | None = None

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.planned.recipe.out

    def start(self, executor: Executor) -> None:
        """Start it; its words go to `run.log`."""
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = self.out / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(self.planned.recipe.model_dump(mode="json"), sort_keys=False))
        command = [sys.executable, "-m", "student_train.cli", "run", str(recipe), "--json"]
        self._job = executor.start(command, self.out / "run.log")
        self.state = "running"

    def look(self) -> None:
        """See whether it has ended."""
        code = None if self._job is None or self.state != "running" else self._job.poll()
        if code is None:
            return
        if code == 0:
            self.state, self.result = "done", json.loads((self.out / "result.json").read_text())
        else:
            lines = (self.out / "run.log").read_text(errors="replace").strip().splitlines()
            self.state, self.error = "failed", lines[-1] if lines else f"exit code {code}"

    def stop(self) -> None:
        """End it, if it runs: its last checkpoint stands."""
        if self._job is not None:
            self._job.stop()

    def progress(self) -> dict[str, Any]:
        """Its last record."""
        path = self.out / METRICS
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 4096))
                records = [
                    json.loads(line) for line in file.read().splitlines()[-2:] if line.startswith(b"{") and line.endswith(b"}")
                ]
        except OSError:
            return {}
        return {key: value for record in records for key, value in record.items()}


def sweep(recipe: SweepRecipe, jobs: int = 1, executor: Executor | None = None) -> dict[str, Any]:
    """Run everything, `jobs` at a time on this machine, or as an executor does it; the report, which is also written to
    `report.json`, `report.md` and `report.png`. Whatever ends this call ends the runs, which can be resumed."""
    refuse_inside_a_cache(recipe.out)
    where = LocalExecutor.of(jobs) if executor is None else executor
    pyplot()  # refuses now, not after hours, where the report could not be drawn
    runs = [Running(planned) for planned in planned_runs(recipe)]
    if not any(run.out.is_dir() for run in runs):
        refuse_strangers(recipe.out, own=("runs", *REPORTS))
    with Claim(recipe.out, "runs a sweep") as claim:
        claim.take()
        _carry_out(runs, where)
        report = summarise(recipe, runs)
        numbers, table, picture = (recipe.out / name for name in REPORTS)
        numbers.write_text(json.dumps(report, indent=1) + "\n")
        table.write_text(markdown(report))
        plot(report, picture)
    return report


def _carry_out(runs: Sequence[Running], executor: Executor) -> None:
    try:
        with Live(_table(runs), refresh_per_second=2, console=Console(stderr=True)) as live:
            while any(run.state in {"waiting", "running"} for run in runs):
                for run in runs:
                    run.look()
                free = executor.slots - sum(run.state == "running" for run in runs)
                for run in [run for run in runs if run.state == "waiting"][:free]:
                    run.start(executor)
                live.update(_table(runs))
                time.sleep(POLL_SECONDS)
    finally:
        for run in runs:
            run.stop()


def _table(runs: Sequence[Running]) -> Table:
    done = sum(run.state == "done" for run in runs)
    table = Table("run", "seed", "state", "step", "loss", "validation", title=f"{done} of {len(runs)} runs")
    for run in runs:
        last = run.progress() if run.state == "running" else {}
        at = f"{last['step']}/{run.planned.recipe.steps}" if "step" in last else ""
        shown = run.error[:60] if run.state == "failed" else run.state
        loss = f"{last['loss']:.4f}" if "loss" in last else ""
        validation = run.result.get("validation_loss", last.get("validation_loss"))
        table.add_row(run.planned.group, str(run.planned.seed), shown, at, loss, "" if validation is None else f"{validation:.4f}")
    return table


def summarise(recipe: SweepRecipe, runs: Sequence[Running]) -> dict[str, Any]:
    """By group, mean and standard deviation over seeds of each number of the results; best first. Failed runs are named."""
    groups: list[dict[str, Any]] = []
    for name in dict.fromkeys(run.planned.group for run in runs):
        own = [run for run in runs if run.planned.group == name]
        results = [run.result for run in own if run.state == "done"]
        numbers = {key: [r[key] for r in results if _is_number(r.get(key))] for key in dict.fromkeys(k for r in results for k in r)}
        means = {key: statistics.fmean(values) for key, values in numbers.items() if values}
        spreads = {key: statistics.stdev(values) for key, values in numbers.items() if len(values) > 1}
        groups.append({"name": name, "runs": len(results), "mean": means, "sd": spreads})
    worst = math.inf if recipe.ranking == "lowest" else -math.inf
    groups.sort(key=lambda g: g["mean"].get(recipe.metric, worst), reverse=recipe.ranking == "highest")
    failed = [{"name": r.planned.group, "seed": r.planned.seed, "error": r.error} for r in runs if r.state == "failed"]
    return {"metric": recipe.metric, "order": recipe.ranking, "groups": groups, "failed": failed}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
