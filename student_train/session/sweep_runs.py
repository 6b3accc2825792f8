"""The runs of a sweep, each a process of its own, and a table that fills while they run."""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from run_kit.executor import Executor
from signal_store.ledger.documents import refuse_inside_a_cache
from signal_view.extras import pyplot
from student_train.session.claim import Claim, refuse_strangers
from student_train.session.sweep_report import markdown, plot
from student_train.sweep_recipe import PlannedRun, SweepRecipe, planned_runs
from student_train.train.metrics import METRICS

REFRESH_PER_SECOND = 2
REPORTS = ("report.json", "report.md", "report.png")


@dataclass(slots=True)
class Running:
    """A run and how it ended: `done`, `failed`, or not yet. `code`: its exit code, once it is there."""

    planned: PlannedRun
    ended: str = ""
    error: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    code: "Future[int] | None" = None

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.planned.recipe.out

    @property
    def state(self) -> str:
        """For the table."""
        return self.ended or ("running" if self.code is not None and self.code.running() else "waiting")

    def submit(self, executor: Executor) -> "Future[int]":
        """Have it carried out; its words go to `run.log`."""
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = self.out / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(self.planned.recipe.model_dump(mode="json"), sort_keys=False))
        command = [sys.executable, "-m", "student_train.cli", "run", str(recipe), "--json"]
        self.code = executor.submit(command, self.out / "run.log")
        return self.code

    def end(self, code: int) -> None:
        """It has ended with this exit code."""
        if code == 0:
            self.ended, self.result = "done", json.loads((self.out / "result.json").read_text())
        else:
            lines = (self.out / "run.log").read_text(errors="replace").strip().splitlines()
            self.ended, self.error = "failed", lines[-1] if lines else f"exit code {code}"

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


def carry_out(recipe: SweepRecipe, executor: Executor) -> dict[str, Any]:
    """Run everything, and report. See `student_train.commands.sweep`."""
    refuse_inside_a_cache(recipe.out)
    pyplot()  # refuses now, not after hours, where the report could not be drawn
    runs = [Running(planned) for planned in planned_runs(recipe)]
    if not any(run.out.is_dir() for run in runs):
        refuse_strangers(recipe.out, own=("runs", *REPORTS))
    with Claim(recipe.out, "runs a sweep") as claim:
        claim.take()
        _run_all(runs, executor)
        report = summarise(recipe, runs)
        numbers, table, picture = (recipe.out / name for name in REPORTS)
        numbers.write_text(json.dumps(report, indent=1) + "\n")
        table.write_text(markdown(report))
        plot(report, picture)
    return report


def _run_all(runs: Sequence[Running], executor: Executor) -> None:
    def shown() -> Table:
        return _table(runs)

    try:
        with Live(get_renderable=shown, refresh_per_second=REFRESH_PER_SECOND, console=Console(stderr=True)):
            run_of = {run.submit(executor): run for run in runs}
            for code in as_completed(run_of):
                run_of[code].end(code.result())
    finally:
        executor.stop()


def _table(runs: Sequence[Running]) -> Table:
    done = sum(run.ended == "done" for run in runs)
    table = Table("run", "seed", "state", "step", "loss", "validation", title=f"{done} of {len(runs)} runs")
    for run in runs:
        state = run.state  # it may change meanwhile: a thread draws this
        last = run.progress() if state == "running" else {}
        at = f"{last['step']}/{run.planned.recipe.steps}" if "step" in last else ""
        shown = run.error[:60] if state == "failed" else state
        loss = f"{last['loss']:.4f}" if "loss" in last else ""
        validation = run.result.get("validation_loss", last.get("validation_loss"))
        table.add_row(run.planned.group, str(run.planned.seed), shown, at, loss, "" if validation is None else f"{validation:.4f}")
    return table


def summarise(recipe: SweepRecipe, runs: Sequence[Running]) -> dict[str, Any]:
    """By group, mean and standard deviation over seeds of each number of the results; best first. Failed runs are named."""
    groups: list[dict[str, Any]] = []
    for name in dict.fromkeys(run.planned.group for run in runs):
        own = [run for run in runs if run.planned.group == name]
        results = [run.result for run in own if run.ended == "done"]
        numbers = {key: [r[key] for r in results if _is_number(r.get(key))] for key in dict.fromkeys(k for r in results for k in r)}
        means = {key: statistics.fmean(values) for key, values in numbers.items() if values}
        spreads = {key: statistics.stdev(values) for key, values in numbers.items() if len(values) > 1}
        groups.append({"name": name, "runs": len(results), "mean": means, "sd": spreads})
    worst = math.inf if recipe.ranking == "lowest" else -math.inf
    groups.sort(key=lambda g: g["mean"].get(recipe.metric, worst), reverse=recipe.ranking == "highest")
    failed = [{"name": r.planned.group, "seed": r.planned.seed, "error": r.error} for r in runs if r.ended == "failed"]
    return {"metric": recipe.metric, "order": recipe.ranking, "groups": groups, "failed": failed}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
