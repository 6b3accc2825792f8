"""What is asked of a finished student: how much of its teacher it kept, what objective would suit it, what it writes for the next round."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from run_kit.recipe_file import load_recipe
from signal_store.cache import Cache, open_cache
from signal_store.errors import InputError, MismatchError
from student_train.cli import app
from student_train.commands.fidelity import fidelity_report
from student_train.commands.generate import generate
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from teacher_cache.commands.build import build
from teacher_cache.commands.extend import extend
from tests.conftest import RecipeMaker
from tests.tiny import CONTEXT, make_model


def called(*arguments: object) -> str:
    found = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, knowing_cache: Cache) -> Path:
    folder = tmp_path_factory.mktemp("stranger")
    make_model("qwen3", knowing_cache.manifest.tokenizer.vocab_size, seed=3).save_pretrained(folder)
    return folder


def test_a_student_that_is_its_teacher_has_kept_everything(knowing_cache: Cache, stranger: Path) -> None:
    same = fidelity_report(Path(knowing_cache.manifest.teacher.name), knowing_cache.uri)
    assert same["agreement"] == 1.0
    assert same["overlap"] > 0.97  # 8-bit codes of the head tie
    assert 0 <= same["kl"] < 1e-3
    assert abs(same["entropy_gap"]) < 1e-3
    assert 0 <= same["calibration_error"] <= 1
    assert same["cka"].keys() == {"2/2", "3/3"}
    assert all(value == pytest.approx(1, abs=1e-3) for value in same["cka"].values())
    other = json.loads(called("fidelity", stranger, knowing_cache.uri, "--json"))
    assert other["tokens"] == same["tokens"] > 100
    assert other["agreement"] < 0.5
    assert other["kl"] > 0.1
    assert all(value < 0.9 for value in other["cka"].values())
    assert fidelity_report(stranger, knowing_cache.uri, 60)["tokens"] < same["tokens"]
    assert "CKA of teacher's block / student's at its depth, 2/2" in called("fidelity", stranger, knowing_cache.uri, "--bf16")


def test_fidelity_needs_held_out_text(recipe_for: RecipeMaker, texts: dict[str, Path], stranger: Path, tmp_path: Path) -> None:
    sources = [{"name": "train", "jsonl": texts["train"], "lexer": "python", "max_documents": 8}]
    made = build(recipe_for(tmp_path / "cache.zarr", sources=sources, signals={"distribution": {"rank": 8}}))
    with pytest.raises(MismatchError, match="no validation split"):
        fidelity_report(stranger, made.uri)


def test_a_plan_is_a_recipe_that_runs(knowing_cache: Cache, stranger: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "cache": knowing_cache.uri,
        "out": str(tmp_path / "run"),
        "student": {"checkpoint": str(stranger)},
        "steps": 1,
        "stream": {"sequence_length": CONTEXT, "global_batch_rows": 8, "workers": 0},
    }
    recipe, evaluation, planned = tmp_path / "ask.yaml", tmp_path / "kept.json", tmp_path / "planned.yaml"
    recipe.write_text(yaml.safe_dump(asked))
    evaluation.write_text(called("fidelity", stranger, knowing_cache.uri, "--json"))
    found = json.loads(called("plan", recipe, "--evaluation", evaluation, "--write", planned, "--json"))
    by_place = {choice["place"]: choice for choice in found}
    assert by_place["losses.evidence"]["value"] == {}
    assert by_place["losses.gate"]["value"] == {}
    assert "tagger" not in by_place["losses.importance"]["why"]
    assert "why" in called("plan", recipe)
    result = run(load_recipe(planned, [], RunRecipe))
    assert result["steps"] == 1
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["evidence_loss"] >= 0


def test_a_plan_says_what_the_cache_lacks(cache: Cache, stranger: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "ask.yaml"
    recipe.write_text(yaml.safe_dump({"cache": cache.uri, "out": "x", "student": {"checkpoint": str(stranger)}, "steps": 1}))
    by_place = {choice["place"]: choice for choice in json.loads(called("plan", recipe, "--json"))}
    assert by_place["losses.replay"]["value"] is None
    assert "replay" in by_place["losses.replay"]["why"]
    assert by_place["losses.apc"]["value"] is not None
    assert by_place["losses.importance"]["value"] is None
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(InputError, match="not an evaluation"):
        CliRunner().invoke(app, ["plan", str(recipe), "--evaluation", str(bad)], catch_exceptions=False)


def test_two_rounds(recipe_for: RecipeMaker, texts: dict[str, Path], tmp_path: Path) -> None:
    """A student learns, writes, its teacher scores what it wrote, and it learns from both."""
    sources: list[dict[str, Any]] = [
        {"name": "train", "jsonl": texts["train"], "lexer": "python", "max_documents": 16},
        {"name": "held-out", "split": "validation", "jsonl": texts["validation"], "max_documents": 4},
    ]
    recipe = recipe_for(tmp_path / "cache.zarr", sources=sources, signals={"distribution": {"rank": 16}})
    first_cache = build(recipe)
    base: dict[str, Any] = {
        "cache": first_cache.uri,
        "losses": {"forward_kl": {"temperature": 1.0}},
        "steps": 2,
        "stream": {"sequence_length": CONTEXT, "global_batch_rows": 4, "workers": 0},
        "validation": {"every": 2},
    }
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    student = {"config": {**shape, "max_position_embeddings": 64, "eos_token_id": 0}}
    run(RunRecipe.model_validate({**base, "out": tmp_path / "round-0", "student": student}))
    written = tmp_path / "round-1.jsonl"
    found = generate(tmp_path / "round-0" / "student", first_cache.uri, written, samples=12, new_tokens=16, unfinished=True)
    assert found["written"] + found["refused"] == 12
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert 0 < len(rows) == found["written"]
    text = "".join(texts["train"].read_text().splitlines())
    for row in rows:
        assert row.keys() == {"prompt", "completion"}
        assert json.dumps(row["prompt"], ensure_ascii=False)[1:-1] in text  # of the cache's texts, byte for byte
        assert row["completion"]
        assert not {"\ufffd", "<|end|>"} & {row["completion"][-1:], row["prompt"][-1:], row["prompt"][:1], row["prompt"][-7:]}
    again = tmp_path / "again.jsonl"
    generate(tmp_path / "round-0" / "student", first_cache.uri, again, samples=12, new_tokens=16, unfinished=True)
    assert again.read_bytes() == written.read_bytes()

    round_1 = {"name": "round-1", "jsonl": written, "prompt": "prompt", "completion": "completion"}
    extend(recipe_for(tmp_path / "cache.zarr", sources=[*sources, round_1], signals={"distribution": {"rank": 16}}))
    grown = open_cache(first_cache.uri)
    assert grown.seal.generation == 1
    learned = {"checkpoint": str(tmp_path / "round-0" / "student")}
    mix = {**base["stream"], "mix": {"weights": {"train": 0.5, "round-1": 0.5}}}
    result = run(RunRecipe.model_validate({**base, "out": tmp_path / "round-1", "student": learned, "stream": mix}))
    assert result["steps"] == 2


def test_a_student_that_never_ends_is_said_so(knowing_cache: Cache, stranger: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text ended"):
        generate(stranger, knowing_cache.uri, tmp_path / "x.jsonl", samples=2, new_tokens=1, seed=1)
    with pytest.raises(InputError, match="no room"):
        generate(stranger, knowing_cache.uri, tmp_path / "x.jsonl", samples=2, new_tokens=60)


def test_a_plan_honours_what_it_does_not_decide(knowing_cache: Cache, stranger: Path, tmp_path: Path) -> None:
    recipe, planned = tmp_path / "ask.yaml", tmp_path / "planned.yaml"
    asked: dict[str, Any] = {"cache": knowing_cache.uri, "out": "x", "student": {"checkpoint": str(stranger)}, "steps": 1}
    asked |= {
        "without": ["explicit", "temporal"],
        "losses": {"parameter_anchor": {"weight": 0.3}},
        "stream": {"sequence_length": CONTEXT},
    }
    recipe.write_text(yaml.safe_dump(asked))
    called("plan", recipe, "--write", planned)
    found = load_recipe(planned, [], RunRecipe).objective
    assert found.parameter_anchor is not None
    assert found.parameter_anchor.weight.start == 0.3
    off = ("forward_kl", "jsd", "cross_entropy", "importance", "gate", "replay", "asr")
    assert [name for name, term in found if name in off and term is not None] == []
    assert found.evidence is not None


def test_one_cached_temperature_is_enough_for_a_plan(
    recipe_for: RecipeMaker, texts: dict[str, Path], stranger: Path, tmp_path: Path
) -> None:
    sources = [{"name": "train", "jsonl": texts["train"], "lexer": "python", "max_documents": 8}]
    signals = {"distribution": {"rank": 8, "temperatures": [1.0]}}
    made = build(recipe_for(tmp_path / "cache.zarr", sources=sources, signals=signals))
    recipe = tmp_path / "ask.yaml"
    recipe.write_text(yaml.safe_dump({"cache": made.uri, "out": "x", "student": {"checkpoint": str(stranger)}, "steps": 1}))
    by_place = {choice["place"]: choice["value"] for choice in json.loads(called("plan", recipe, "--json"))}
    assert {"temperature": 1.0} in (by_place.get("losses.forward_kl"), by_place.get("losses.jsd"))
