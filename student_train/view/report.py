"""report: runs beside each other on one page: results, what their recipes differ in, curves, terms, gradient shares."""

import html as html_module
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from signal_store.errors import NotFoundError
from signal_store.manifest import Split
from signal_view.extras import pyplot
from signal_view.page import Block, page, picture, table
from signal_view.plots import shown
from signal_view.summary import Section
from student_train.evaluate.gradient_shares import SUFFIX
from student_train.recipe import flat
from student_train.train.metrics import METRICS, read_json, read_metrics
from student_train.view.gradient_shares import plot_shares, shares_of
from student_train.view.plots import plot_against_teacher, plot_cka
from student_train.view.students import ABOUT, RESULT, about_run, cache_of, recipe_of, student_after, student_before

NUMBERS = ("validation_loss", "agreement", "overlap", "kl", "entropy_gap", "calibration_error", "tokens_per_second", "parameters")
SMOOTHED = 50
"""Points of a training curve; each is the mean of its share of the steps."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run as its folder tells it; `result` is empty while it runs."""

    name: str
    about: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any]
    folder: Path

    @classmethod
    def of(cls, folder: Path, name: str) -> "Run":
        """NotFoundError where there is none."""
        recipe_of(folder)  # refuses what is none
        about, metrics, result = about_run(folder), folder / METRICS, folder / RESULT
        records = read_metrics(metrics) if metrics.is_file() else []
        return cls(name, about, records, read_json(result) if result.is_file() else {}, folder)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a number of its log."""
        found = [(int(r["step"]), float(r[name])) for r in self.records if isinstance(r.get(name), int | float)]
        return [step for step, _ in found], [value for _, value in found]


def report(folders: Sequence[Path], *, students: bool = False) -> str:
    """HTML of these runs, in their order; of a folder that is no run, of all runs below it. NotFoundError where there is none.
    `students`: load those that are finished, and show them beside their teacher."""
    folders = [run for folder in folders for run in runs_below(folder)]
    runs = [Run.of(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    return page(f"{len(runs)} runs" if len(runs) > 1 else runs[0].name, list(_blocks(runs, students=students)))


def runs_below(folder: Path) -> list[Path]:
    """The folder, if it is a run's; else those of all runs below it."""
    if (folder / ABOUT).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.rglob(ABOUT))
    if not found:
        raise NotFoundError("no run here", expected=ABOUT, where=folder)
    return found


def short_names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths without the beginning that all share."""
    parts = [folder.absolute().parts for folder in folders]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def _blocks(runs: list[Run], *, students: bool) -> Iterator[Block]:
    yield Block("results", table(_results(runs)))
    if len(runs) > 1 and (differences := _differences(runs)).rows:
        yield Block("what the recipes differ in", table(differences))
    curves = [axes for name in ("validation_loss", "kl", "agreement") if (axes := plot_series(runs, name)) is not None]
    yield Block("held-out text", "".join(picture(axes, axes.get_title()) for axes in curves) or _nothing("no validation yet"))
    yield Block("training", _pictures(runs, ["loss", "gradient_norm", "tokens_per_second"]) or _nothing("no step yet"))
    yield Block("terms", _pictures(runs, _terms(runs)) or _nothing("no term was logged"))
    shares = [run for run in runs if any(name.endswith(SUFFIX) for record in run.records for name in record)]
    if shares:
        drawn = [(run, plot_shares(*shares_of(run.folder))) for run in shares]
        yield Block("gradient shares", "".join(picture(axes, f"what moves the student: {run.name}") for run, axes in drawn))
    if students:
        yield Block("students and teacher", _beside_teacher([run for run in runs if (run.folder / "student").is_dir()]))
    yield Block("provenance", table(_provenance(runs)))


def _beside_teacher(runs: list[Run]) -> str:
    """By cache, one sentence as its students knew it after training, and as the first of them knew it before; then each one's
    CKA."""
    parts = []
    opened = {run.name: cache_of(run.folder) for run in runs}
    others = [run for run in runs if run.about.get("tokenizer") not in (None, opened[run.name].manifest.tokenizer.digest)]
    runs = [run for run in runs if run not in others]
    for uri in dict.fromkeys(opened[run.name].uri for run in runs):
        mine = [run for run in runs if opened[run.name].uri == uri]
        cache = opened[mine[0].name]
        split: Split | None = "validation" if len(cache.units("validation")) else None
        with_states = any(layout.tap == "block_output" for layout in cache.manifest.calibration.hidden)
        segment = max((cache.sample(seed, split=split) for seed in range(8)), key=len)
        axes = None
        below = []
        for run in mine:
            students = {f"{run.name}, before": student_before(run.folder, cache)} if axes is None else {}
            students[run.name] = student_after(run.folder, cache)
            if cache.manifest.signals.distribution is not None:
                axes = plot_against_teacher(segment, students, axes=axes)
            if with_states:
                says = f"{run.name}: what its blocks share with the teacher's"
                below.append(picture(plot_cka(students[run.name], cache), says))
        if axes is not None:
            parts.append(picture(axes, f"segment {segment.index} of {segment.source}"))
        parts += below
    parts += [
        _nothing(f"{html_module.escape(run.name)} reads with another tokenizer: token by token it has no teacher") for run in others
    ]
    return "".join(parts) or _nothing("no run has exported its student yet")


def _nothing(says: str) -> str:
    return f'<p class="note">{says}</p>'


def _terms(runs: list[Run]) -> list[str]:
    names = {name for run in runs for record in run.records for name in record}
    return sorted(name for name in names if name.endswith("_loss") and not name.startswith("validation_loss"))


def _results(runs: list[Run]) -> Section:
    numbers = [name for name in NUMBERS if any(run.result.get(name) is not None for run in runs)]
    rows = []
    for run in runs:
        steps = int(run.records[-1]["step"]) if run.records else 0
        state = "done" if run.result else "not finished"
        cells = [_number(run.result.get(name)) for name in numbers]
        rows.append((run.name, state, f"{steps:,} of {run.about['recipe']['steps']:,}", *cells))
    return Section.of("results", ("run", "state", "steps", *numbers), rows)


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def _differences(runs: list[Run]) -> Section:
    recipes = [{p: json.dumps(v, ensure_ascii=False) for p, v in flat(run.about["recipe"])} for run in runs]
    places = [p for p in dict.fromkeys(p for r in recipes for p in r) if p != "out" and len({r.get(p) for r in recipes}) > 1]
    return Section.of(
        "differences", ("place", *(run.name for run in runs)), [(p, *(r.get(p, "") for r in recipes)) for p in places]
    )


def _provenance(runs: list[Run]) -> Section:
    names = ("cache_id", "generation", "recipe_digest", "commit", "processes", "parallel", "machine", "python")
    rows = [(name, *(str(run.about.get(name, "")) for run in runs)) for name in names]
    held = [run.about.get("versions") for run in runs]
    versions = [one if isinstance(one, dict) else {} for one in held]
    rows += [(name, *(str(one.get(name, "")) for one in versions)) for name in dict.fromkeys(n for one in versions for n in one)]
    return Section.of("provenance", ("", *(run.name for run in runs)), rows)


def _pictures(runs: list[Run], names: Sequence[str]) -> str:
    drawn = [axes for name in names if (axes := plot_series(runs, name, smooth=True)) is not None]
    return "".join(picture(axes, axes.get_title()) for axes in drawn)


def plot_series(runs: Sequence[Run], name: str, *, smooth: bool = False, axes: Any = None) -> Any:
    """A number of the logs over steps, a line a run; None where no run has it. Returns the matplotlib Axes. `smooth`: means of a
    fiftieth of the steps each."""
    found = [(f"C{number}", run, *_series(run, name)) for number, run in enumerate(runs)]
    found = [(colour, run, steps, values) for colour, run, steps, values in found if steps]
    if not found:
        return None
    axes = axes if axes is not None else pyplot().subplots(figsize=(7.5, 3.4), layout="constrained")[1]
    for colour, run, steps, values in found:
        x, y = _smoothed(steps, values) if smooth else (np.asarray(steps), np.asarray(values))
        axes.plot(x, y, marker="" if smooth else "o", ms=3, lw=1.3, color=colour, label=shown(run.name, 60))
    axes.set(xlabel="step", title=name.replace("_", " "))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def _series(run: Run, name: str) -> tuple[list[int], list[float]]:
    if name != "tokens_per_second":
        return run.series(name)
    steps, tokens = run.series("tokens")
    _, seconds = run.series("seconds")
    return (
        (steps, [n / s if s else math.nan for n, s in zip(tokens, seconds, strict=True)])
        if len(tokens) == len(seconds)
        else ([], [])
    )


def _smoothed(steps: Sequence[int], values: Sequence[float]) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    parts = min(SMOOTHED, len(steps))
    return tuple(np.asarray([part.mean() for part in np.array_split(np.asarray(each, float), parts)]) for each in (steps, values))  # type: ignore[return-value]
