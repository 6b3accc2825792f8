"""The trainer in one process: what it refuses, what it says of a run, how it goes on."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import student_train
from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError, SignalStoreError
from student_train.commands.explain import explain
from student_train.commands.plot_shares import plot_shares
from student_train.commands.run import run
from student_train.commands.sweep import sweep
from student_train.recipe import RunRecipe
from student_train.session.claim import Claim
from student_train.sweep_recipe import SweepRecipe
from student_train.train import start as trainer
from student_train.view.gradient_shares import shares_of
from tests.integration.test_parallel import losses, recipe_of


def test_a_loss_that_is_not_finite_names_its_texts(cache: Cache, tmp_path: Path) -> None:
    recipe = recipe_of(cache, tmp_path, optimizer={"learning_rate": 1e30, "clip_norm": None}, steps=30)
    with pytest.raises(SignalStoreError, match=r"not finite.* segments \[.*which begin \d+: '") as caught:
        run(recipe)
    assert "\n" not in str(caught.value)
    assert "Lower the learning rate, in an out of its own" in str(caught.value)
    lower = recipe_of(cache, tmp_path, steps=30)
    with pytest.raises(
        MismatchError, match=r"another run \(.*learning_rate.*Give another out.*no checkpoint yet: remove the folder"
    ) as caught:
        run(lower)
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path)
    assert run(lower.model_copy(update={"steps": 2}))["steps"] == 2


def test_another_cache_is_refused_unless_told_so(cache: Cache, exact_cache: Cache, tmp_path: Path) -> None:
    run(recipe_of(cache, tmp_path, steps=2))
    other = recipe_of(exact_cache, tmp_path, steps=4)
    with pytest.raises(MismatchError, match="another run"):
        run(other)
    (tmp_path / "result.json").unlink()
    (tmp_path / "run.json").unlink()
    with pytest.raises(MismatchError, match="another cache_id"):
        run(other)
    result = run(other.model_copy(update={"checkpoint": other.checkpoint.model_copy(update={"accept_other_cache": True})}))
    assert result["steps"] == 4
    assert json.loads((tmp_path / "run.json").read_text())["cache_id"] == exact_cache.manifest.cache_id


def test_a_folder_of_something_else_is_not_written_into(tmp_path: Path, cache: Cache) -> None:
    """A source's, say. A recipe, logs and what is hidden may wait there for a run; a run goes on beside whatever has come since."""
    recipe = recipe_of(cache, tmp_path, steps=1, validation=None)
    base = {"cache": cache.uri, "student": {"config": {"model_type": "llama"}}, "losses": {"cross_entropy": {}}, "steps": 1}
    many = SweepRecipe(out=tmp_path, base=base, metric="parameters")
    for name in ("recipe.yaml", "run.log", "slurm-1.out", ".keep"):
        (tmp_path / name).write_text("")
    for name in ("a.txt", "data.jsonl", "student"):
        (tmp_path / name).mkdir() if name == "student" else (tmp_path / name).write_text("x")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match=f"holds something else.*found {name}; in {tmp_path}"):
            run(recipe)
        with pytest.raises(InputError, match=f"holds something else.*found {name}"):
            sweep(many)
        assert sorted(tmp_path.iterdir()) == before
        (tmp_path / name).rmdir() if name == "student" else (tmp_path / name).unlink()
    run(recipe)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "result.json").unlink()
    assert run(recipe)["steps"] == 1


def test_a_run_folder_says_what_it_was(cache: Cache, tmp_path: Path) -> None:
    recipe = recipe_of(cache, tmp_path, steps=2)
    result = run(recipe)
    about: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
    assert RunRecipe.model_validate(about["recipe"]) == recipe
    assert {"command", "versions", "commit", "machine", "gpus", "cache_id", "generation"} <= about.keys()
    assert {"validation_loss", "agreement", "overlap", "kl", "entropy_gap", "calibration_error"} <= result.keys()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["row_fill"] <= 1 for record in records if "loss" in record)


def test_the_verbs_are_named_at_the_top() -> None:
    assert student_train.run is run
    assert student_train.explain is explain


def test_a_term_of_no_weight_has_no_loss_in_the_log(cache: Cache, tmp_path: Path) -> None:
    terms = {"cross_entropy": {}, "forward_kl": {"temperature": 1.0, "weight": {"start": 0, "end": 1, "begin": 0.5}}}
    run(recipe_of(cache, tmp_path, losses=terms, steps=4, validation=None))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["forward_kl_loss" in record for record in records] == [False, False, False, True]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_bit_for_bit(cache: Cache, tmp_path: Path, workers: int) -> None:
    stream = {"sequence_length": 48, "global_batch_rows": 4, "workers": workers}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(recipe_of(cache, whole, stream=stream))
    run(recipe_of(cache, broken, stream=stream))
    (broken / "result.json").unlink()
    shutil.rmtree(broken / "checkpoints" / "step-00000004")
    (broken / "checkpoints" / ".step-00000004").mkdir()  # as a kill in the middle of saving leaves it
    run(recipe_of(cache, broken, stream=stream))
    assert losses(broken) == losses(whole)
    assert (broken / "student/model.safetensors").read_bytes() == (whole / "student/model.safetensors").read_bytes()


def unfinish(out: Path, step: int = 2) -> None:
    """As a run is that was killed after this step."""
    (out / "result.json").unlink()
    for later in (out / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)


def test_a_run_goes_on_however_it_is_computed_and_says_so(cache: Cache, tmp_path: Path) -> None:
    whole, lean = tmp_path / "whole", tmp_path / "lean"
    run(recipe_of(cache, whole))
    run(recipe_of(cache, lean))
    unfinish(lean)
    leaner: dict[str, Any] = {"stream": {"sequence_length": 48, "global_batch_rows": 4, "workers": 1, "micro_batch_rows": 2}}
    changed = recipe_of(cache, lean, **leaner, precision="bfloat16", activation_checkpointing=True)
    run(changed)
    assert losses(lean) == pytest.approx(losses(whole), rel=1e-2)
    about = json.loads((lean / "run.json").read_text())
    (entry,) = about["history"]
    assert entry["step"] == 2
    assert entry["changed"]["stream.micro_batch_rows"] == [None, 2]
    assert entry["changed"]["precision"] == ["float32", "bfloat16"]
    assert entry["changed"]["start.precision.taken"] == ["float32", "bfloat16"]
    assert entry["changed"].keys() >= {"stream.workers", "activation_checkpointing"}
    assert about["recipe_digest"] == json.loads((whole / "run.json").read_text())["recipe_digest"]
    before = (lean / "metrics.jsonl").read_bytes()
    run(recipe_of(cache, lean))  # finished: nothing is repeated, whatever it is asked to be computed in
    assert (lean / "metrics.jsonl").read_bytes() == before
    with pytest.raises(MismatchError, match=r"another run \(optimizer.learning_rate differ\)"):
        run(recipe_of(cache, lean, optimizer={"learning_rate": 3e-2, "eps": 1e-3}))


def test_rows_are_cut_as_they_were_when_the_run_began(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(cache, tmp_path)
    run(recipe)
    assert json.loads((tmp_path / "run.json").read_text())["packed"] is True
    unfinish(tmp_path)
    monkeypatch.setattr(trainer, "packs_rows", lambda *_: False)
    with pytest.raises(MismatchError, match="rows hold several segments"):
        run(recipe)
    run(recipe_of(cache, tmp_path / "padded"))
    unfinish(tmp_path / "padded")
    before = losses(tmp_path / "padded")
    monkeypatch.undo()
    run(recipe_of(cache, tmp_path / "padded"))  # able to pack now, and does not
    assert json.loads((tmp_path / "padded" / "run.json").read_text())["packed"] is False
    assert losses(tmp_path / "padded") == before


def test_two_processes_do_not_train_in_one_folder(cache: Cache, tmp_path: Path) -> None:
    recipe = recipe_of(cache, tmp_path / "run", steps=2)
    run(recipe)
    (tmp_path / "run" / "result.json").unlink()
    with Claim(tmp_path / "run", "trains") as other:
        other.take()
        with pytest.raises(InputError, match=f"another process trains in this folder.*process {os.getpid()}"):
            run(recipe)
        before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        assert before
    run(recipe)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_shares_of_the_gradient_are_logged_and_drawn_and_change_nothing(cache: Cache, tmp_path: Path) -> None:
    for name, changes in (("plain", {}), ("shares", {"gradient_shares_every": 2})):
        run(recipe_of(cache, tmp_path / name, **changes))
    assert losses(tmp_path / "plain") == losses(tmp_path / "shares")
    steps, shares = shares_of(tmp_path / "shares")
    assert steps == [1, 3]
    assert shares.keys() == {"forward_kl", "cross_entropy", "lhsm", "apc", "asr"}
    assert [sum(column) for column in zip(*shares.values(), strict=True)] == pytest.approx([1, 1])
    assert min(min(values) for values in shares.values()) > 0
    plot_shares(tmp_path / "shares", tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 5_000
    with pytest.raises(InputError, match="no gradient shares"):
        shares_of(tmp_path / "plain")
