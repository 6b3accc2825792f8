"""Families: what is cached is what the model says of a segment by itself, and what cannot be cached is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from family_table import PAGE, gives_distribution, row
from model_taps.blocks import num_layers
from model_taps.neighbours import relative_difference
from model_taps.slices import tap_states
from model_taps.tiny_config import architectures, tiny_config, tiny_model
from signal_store.errors import InputError
from signal_view import CacheView
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from teacher_cache.cli import app
from teacher_cache.commands.build import build
from teacher_cache.commands.doctor.model_check import BYTES, saved
from tests.conftest import RecipeMaker
from tests.tiny import COMMON, FAMILIES, make_model, make_tokenizer, write_jsonl
from tests.unit.test_neighbours import LONG_ROPE

SAMPLE = ("bloom", "gpt2", "llama4_text", "mamba", "recurrent_gemma", "bert")


def _rows() -> dict[str, str]:
    return {line.split("|")[1].strip(): line for line in PAGE.read_text().splitlines() if line.startswith("| ")}


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_is_what_is_found(name: str) -> None:
    assert row(name) == _rows()[name]


def test_the_table_has_every_architecture() -> None:
    rows = _rows()
    assert [name for name in rows if name != "architecture"] == list(architectures())
    assert sum(gives_distribution(rows[name]) for name in architectures()) > 150
    assert "nothing foresaw" not in PAGE.read_text()


@pytest.mark.parametrize("forward", ["packed", "padded"])
def test_a_short_text_beside_a_long_one_is_what_it_is_alone(forward: str, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    FAMILIES.setdefault("phi3", COMMON)
    tokenizer = make_tokenizer()
    model = make_model("phi3", len(tokenizer), scale=4.0, **LONG_ROPE)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    texts = write_jsonl(tmp_path / "texts.jsonl", [f"x{i} = {'[n for n in y] ' * (12 if i % 3 else 1)}" for i in range(12)])
    cache = build(
        recipe_for(
            tmp_path / "cache",
            teacher={"model": str(tmp_path / "teacher"), "dtype": "float32", "device": "cpu"},
            sources=[{"name": "lines", "jsonl": texts}],
            context=64,
            batch_tokens=256,
            forward=forward,
            signals={"distribution": None, "hidden": {"layers": [4], "values": "float16"}},
        )
    )
    plan = cache.manifest.plan
    assert (plan.forward, plan.split_length) == (forward, 32)
    lengths = {len(segment.input_ids) > 32 for segment in cache}
    assert lengths == {False, True}
    for segment in CacheView.of(cache):
        ids = torch.from_numpy(segment.input_ids.astype(np.int64))[None]
        with torch.no_grad(), tap_states(model, [("block_output", num_layers(model))]) as states:
            model(ids, use_cache=False)
        (alone,) = states.values()
        assert relative_difference(torch.from_numpy(np.asarray(segment.hidden("block_output", 4))), alone[0]) < 0.01


def test_a_student_that_looks_at_its_batch_is_refused(recipe_for: RecipeMaker, tmp_path: Path, cache: object) -> None:
    from signal_store.cache import Cache

    assert isinstance(cache, Cache)
    rope = {**LONG_ROPE["rope_parameters"], "original_max_position_embeddings": 24}
    config = {**COMMON, "model_type": "phi3", "rope_parameters": rope, "original_max_position_embeddings": 24}
    recipe = RunRecipe.model_validate(
        {
            "cache": cache.uri,
            "out": tmp_path / "run",
            "student": {"config": config},
            "stream": {"sequence_length": 48, "global_batch_rows": 2},
            "losses": {"cross_entropy": {}},
            "steps": 1,
        }
    )
    with pytest.raises(InputError, match="depend on the longest segment of a batch"):
        run(recipe)


def test_doctor_builds_what_build_builds(tmp_path: Path) -> None:
    with saved(tiny_model(tiny_config("mamba", BYTES))) as folder:
        called = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path), "--model", str(folder), "--json"])
    found = {check["name"]: check for check in json.loads(called.output)}
    assert found["signal distribution"]["state"] == found["signal hidden"]["state"] == "ok"
    assert found["signal attention"]["state"] == "note"
    assert "no attention rows of this family can be had" in found["signal attention"]["found"]
    assert found["forward passes"]["found"] == "padded"


@pytest.mark.parametrize(("name", "signal"), [("gptj", "attention"), ("mamba", "stats"), ("bart", "replay")])
def test_a_signal_that_is_not_there_is_refused_by_name(name: str, signal: str, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", ["for x in y:\n    if x:\n        return x\n"] * 2)
    with saved(tiny_model(tiny_config(name, BYTES))) as folder, pytest.raises(InputError, match=r"family|final norm"):
        build(
            recipe_for(
                tmp_path / "cache",
                teacher={"model": str(folder), "dtype": "float32", "device": "cpu"},
                sources=[{"name": "lines", "jsonl": texts, "lexer": "python"}],
                signals={"distribution": None, signal: {}},
            )
        )
