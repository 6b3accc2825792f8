"""What the beginnings of later windows, and texts that do not fit, mean for plans, extensions, calibration and estimates."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from signal_store.errors import InputError
from signal_store.io.objects import objects_at
from signal_store.ledger.documents import CALIBRATION, read_document
from teacher_cache.builder.flops import forward_flops
from teacher_cache.builder.plan import read_plan
from teacher_cache.commands.build import build
from teacher_cache.commands.extend import extend
from teacher_cache.commands.plan import plan
from tests.conftest import RecipeMaker
from tests.tiny import CODE, CONTEXT, make_model, make_tokenizer, write_jsonl


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def test_texts_that_do_not_fit_are_counted_and_the_source_still_grows(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(chat("a?", "one") + chat("b?", "far too long " * 40) + chat("c?", "two"))
    source = {"name": "chats", "jsonl": path, "messages": "messages", "long_chats": "refuse", "on_bad_row": "skip"}
    recipe = recipe_for(tmp_path / "cache.zarr", sources=[source], signals={"distribution": {"rank": 4}})
    (found,) = build(recipe).sources
    assert (found.num_documents, found.num_unfit_documents, found.num_skipped_rows, found.num_segments) == (3, 1, 0, 2)
    assert [row.row for row in found.skipped_rows] == [2]
    with path.open("a") as file:
        file.write(chat("d?", "far too long " * 40) + chat("e?", "three"))
    grown = extend(recipe)
    assert [(s.num_documents, s.num_unfit_documents) for s in grown.sources] == [(3, 1), (2, 1)]
    assert [row.row for row in grown.sources[1].skipped_rows] == [4]
    assert len(grown) == 3


def test_a_new_source_of_bad_rows_alone_is_refused(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    first = {"name": "x", "jsonl": write_jsonl(tmp_path / "x.jsonl", CODE)}
    recipe = recipe_for(tmp_path / "cache.zarr", sources=[first], signals={"distribution": {"rank": 4}})
    build(recipe)
    bad = {"name": "bad", "jsonl": first["jsonl"], "text": "txt", "on_bad_row": "skip"}
    with pytest.raises(InputError, match=r"no text.*3 rows skipped.*source bad"):
        extend(recipe_for(tmp_path / "cache.zarr", sources=[first, bad], signals={"distribution": {"rank": 4}}))


def test_calibration_takes_stored_rows_alone(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    recipe = recipe_for(tmp_path / "cache.zarr", overlap=CONTEXT - 8, signals={"distribution": {"rank": 4}})
    own = sum(source.num_tokens for source in build(recipe).sources)
    objects = objects_at(recipe.cache)
    run = sum(unit["tokens"] for unit in read_plan(objects).units)
    calibrated = read_document(objects, CALIBRATION).body["num_tokens"]
    assert calibrated <= own < run


def test_a_tokenizer_with_several_templates_is_kept(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    tokenizer = make_tokenizer()
    one = str(tokenizer.chat_template)
    tokenizer.chat_template = {"default": one, "tool_use": one + "{# tools #}"}
    folder = tmp_path / "teacher"
    make_model("llama", len(tokenizer), scale=8.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = tmp_path / "chats.jsonl"
    path.write_text(chat("a?", "one") * 3)
    source: dict[str, Any] = {"name": "chats", "jsonl": path, "messages": "messages", "chat_template": "tool_use"}
    teacher = {"model": str(folder), "dtype": "float32"}
    recipe = recipe_for(tmp_path / "cache.zarr", sources=[source], teacher=teacher, signals={"distribution": {"rank": 4}})
    (found,) = plan(recipe).sources
    assert found.chats is not None
    assert found.chats.kept_whole == 3
    wrong = recipe_for(
        tmp_path / "other.zarr", sources=[{**source, "chat_template": "tool", "on_bad_row": "skip"}], teacher=teacher
    )
    with pytest.raises(InputError, match="no such chat template"):
        plan(wrong)


def test_a_lexer_that_is_not_there_stops_the_plan(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    source = {"name": "x", "jsonl": write_jsonl(tmp_path / "x.jsonl", CODE), "lexer": "pyton", "on_bad_row": "skip"}
    with pytest.raises(InputError, match="no such lexer"):
        plan(recipe_for(tmp_path / "cache.zarr", sources=[source]))


def test_a_family_without_attention_has_its_operations_counted(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64)
    config.save_pretrained(tmp_path / "mamba")
    recipe = recipe_for(tmp_path / "cache.zarr", teacher={"model": str(tmp_path / "mamba")})
    assert forward_flops(recipe, 10) > 0
