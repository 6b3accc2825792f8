"""The example recipes, as they stand in tools/examples, but for fewer steps: English, Chinese and code, every kind of knowledge."""

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from run_kit.recipe_file import load_recipe
from student_train.commands.run import run
from student_train.importance.rules import load_rules
from student_train.importance.show import token_weights
from student_train.losses import registry
from student_train.losses.kinds import Kind
from student_train.losses.objective import resolve
from student_train.recipe import RunRecipe
from student_train.student.build import build_student
from teacher_cache.commands.build import build
from teacher_cache.recipe import CacheRecipe

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "tools" / "examples"
ROLES = {
    "english": ("pos", "function", "noun"),
    "chinese": ("pos", "function", "noun"),
    "code": ("code", "operator", "keyword"),
}
"""By example, what carries little and what carries much."""


@pytest.mark.parametrize("name", list(ROLES))
def test_an_example_builds_and_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [f"cache={tmp_path}/cache.zarr", "calibration.tokens_per_source=256", "signals.distribution.rank=16"]
    if name == "english":
        script = EXAMPLES / "train_tagger.py"
        tagger = tmp_path / "tagger"
        subprocess.run([sys.executable, str(script), str(EXAMPLES / name / "sentences.jsonl"), str(tagger)], check=True)
        overrides += [f"sources.{number}.tagger.model={tagger}" for number in range(4)]
    cache = build(load_recipe(EXAMPLES / name / "cache.yaml", overrides, CacheRecipe))
    changes = [f"cache={cache.uri}", f"out={tmp_path}/student", "steps=3", "validation.every=3", "stream.global_batch_rows=8"]
    recipe = load_recipe(EXAMPLES / name / "run.yaml", changes, RunRecipe)
    student, _ = build_student(recipe.student, cache)
    terms = resolve(recipe.objective, cache, student).terms
    kinds = registry.kinds()
    assert {kinds[term] for term in terms if term in kinds} == set(Kind)
    run(recipe)
    records = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    for term in terms:
        assert all(math.isfinite(step[f"{term}_loss"]) for step in steps), term
        assert any(step[f"{term}_count"] for step in steps), term

    level, little, much = ROLES[name]
    weights: dict[str, list[float]] = {little: [], much: []}
    for segment in range(0, len(cache), 3):
        for token in token_weights(cache, segment, load_rules()):
            if token.weight is not None and token.roles.get(level) in weights:
                weights[token.roles[level]].append(token.weight)
    assert fmean(weights[little]) < fmean(weights[much])
