"""Many students from one cache: every run a process, failures named and not fatal, a report ranked by the metric."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from signal_store.cache import Cache
from signal_store.errors import InputError
from student_train.cli import app
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from student_train.session.sweep_runs import Running, summarise
from student_train.sweep_recipe import SweepRecipe, planned_runs
from tests.tiny import COMMON


def content_of(cache: Cache, out: Path, **changes: Any) -> dict[str, Any]:
    config = {"model_type": "llama", **COMMON, "num_hidden_layers": 1}
    base = {
        "cache": cache.uri,
        "student": {"config": config},
        "losses": {"forward_kl": {"temperature": 2.0}},
        "steps": 2,
        "stream": {"sequence_length": 48, "global_batch_rows": 2, "workers": 0},
        "validation": {"every": 2},
    }
    return {"out": str(out), "base": base, **changes}


def test_a_sweep_is_every_combination_with_every_seed(cache: Cache, tmp_path: Path) -> None:
    variants: dict[str, Any] = {"kl": {}, "ce": {"losses.forward_kl": None, "losses.cross_entropy": {}}}
    content = content_of(cache, tmp_path, variants=variants, matrix={"optimizer.learning_rate": [1e-3, 1e-2]}, seeds=[0, 7])
    runs = planned_runs(SweepRecipe.model_validate(content))
    assert len(runs) == 8
    assert len({run.recipe.out for run in runs}) == 8
    last = runs[-1].recipe
    assert (last.seed, last.student.seed, last.stream.seed, last.optimizer.learning_rate) == (7, 7, 7, 1e-2)
    assert last.objective.forward_kl is None
    assert last.objective.cross_entropy is not None
    assert RunRecipe.model_validate(last.model_dump(mode="json")) == last
    better, worse = (Running(planned, ended="done", result={"agreement": a}) for planned, a in ((runs[0], 0.9), (runs[-1], 0.1)))
    report = summarise(SweepRecipe.model_validate({**content, "metric": "agreement"}), [worse, better])
    assert [group["mean"]["agreement"] for group in report["groups"]] == [0.9, 0.1]
    wrongs: list[dict[str, Any]] = [
        {"variants": {"x": {"losses.tlaa": {}}}},
        {"base": {**content["base"], "out": "x"}},
        {"matrix": {"steps": []}},
        {"matrix": {"out": ["x", "y"]}},
        {"base": {**content["base"], "seed": 42}},
        {"base": {**content["base"], "stream": {"seed": 42}}},
        {"variants": {"x": {"optimizer": {"learning_rate": 1.0}}}},
        {"variants": {"x": {"optimizer.eps": 1e-6, "optimizer": {"weight_decay": 0.1}}}, "matrix": {}},
        {"matrix": {"optimizer.eps": [1e-6], "optimizer": [{"weight_decay": 0.1}]}},
        {"metric": "val_loss"},
        {"metric": "agreement", "base": {**content["base"], "validation": None}},
    ]
    for wrong in wrongs:
        with pytest.raises((InputError, ValueError)):
            planned_runs(SweepRecipe.model_validate({**content, **wrong}))


def test_failures_are_named_and_others_go_on(cache: Cache, tmp_path: Path) -> None:
    variants: dict[str, Any] = {"good": {}, "too hot": {"losses.forward_kl.temperature": 77.0}}
    recipe = tmp_path / "sweep.yaml"
    recipe.write_text(json.dumps(content_of(cache, tmp_path / "out", variants=variants)))
    first = CliRunner().invoke(app, ["sweep", str(recipe), "--jobs", "2", "--json"])
    assert first.exit_code == 1
    report = json.loads(first.stdout.strip().splitlines()[-1])
    assert [group["runs"] for group in report["groups"]] == [1, 0]
    assert report["groups"][0]["mean"]["validation_loss"] > 0
    assert "cannot serve this temperature" in report["failed"][0]["error"]
    assert "too hot" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/report.png").stat().st_size > 1000
    (kept,) = [
        run.recipe for run in planned_runs(SweepRecipe.model_validate(json.loads(recipe.read_text()))) if run.group == "good"
    ]
    before = (kept.out / "metrics.jsonl").stat().st_mtime_ns
    run(kept)  # a finished run is left alone
    assert (kept.out / "metrics.jsonl").stat().st_mtime_ns == before
