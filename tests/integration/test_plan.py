"""What plan makes of sources: the same in any number of processes, bad rows counted, useless sources found before the teacher runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from model_taps.loading import tokenizer_digest, vocabulary_size
from signal_store.errors import InputError
from signal_store.io.objects import objects_at
from signal_store.ledger.documents import PLAN
from signal_view import CacheView, open_cache
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from teacher_cache.builder.plan import read_plan
from teacher_cache.commands.build import build
from teacher_cache.commands.extend import extend
from teacher_cache.commands.plan import plan
from teacher_cache.corpus import processes
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals import distribution
from teacher_cache.worker import Worker
from tests.conftest import RecipeMaker
from tests.tiny import CODE, PROSE, make_model, make_tokenizer, write_jsonl

TURNS = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]


@pytest.fixture
def mixed(tmp_path: Path, texts: dict[str, Path]) -> list[dict[str, Any]]:
    """Sources of each kind, one with bad rows, one cut short."""
    (tmp_path / "code").mkdir()
    for i, text in enumerate(CODE):
        (tmp_path / "code" / f"{i}.py").write_text(text)
    rows = [json.dumps({"text": text}) for text in PROSE]
    (tmp_path / "bad.jsonl").write_text("\n".join([rows[0], "{", rows[1], '{"text": ""}', '{"txt": "a"}', rows[2], "]"]) + "\n")
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(5)))
    tagger = {"parser": "pygments"}
    return [
        {"name": "train", "jsonl": texts["train"], "lexer": "python", "tagger": tagger, "max_documents": 30},
        {"name": "bad", "jsonl": tmp_path / "bad.jsonl", "on_bad_row": "skip"},
        {"name": "chats", "jsonl": chats, "messages": "messages"},
        {"name": "code", "folder": tmp_path / "code", "split": "validation"},
    ]


def test_the_plan_is_the_same_in_any_number_of_processes(
    tmp_path: Path,
    recipe_for: RecipeMaker,
    mixed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    one = plan(recipe_for(tmp_path / "one.zarr", sources=mixed, overlap=8))
    monkeypatch.setattr(processes, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr("teacher_cache.builder.unit_staging.MOST_ROWS", 7)
    two = plan(recipe_for(tmp_path / "two.zarr", sources=mixed, overlap=8), Worker(processes=2))
    assert one.digest == two.digest
    bad = next(source for source in two.sources if source.name == "bad")
    assert (bad.num_documents, bad.num_empty_documents, bad.num_skipped_rows) == (4, 1, 3)
    assert [(row.row, row.reason) for row in bad.skipped_rows] == [
        (2, "a line is not JSON"),
        (5, "no such column"),
        (7, "a line is not JSON"),
    ]
    said = capfd.readouterr().err
    assert "source bad: 3 rows skipped" in said
    assert f"{tmp_path / 'bad.jsonl'}:5" in said


def test_a_worker_processs_error_is_the_same_line(
    tmp_path: Path, recipe_for: RecipeMaker, mixed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = [{**source, "on_bad_row": "stop"} for source in mixed]
    said = []
    for name, worker in (("one", Worker()), ("two", Worker(processes=2))):
        monkeypatch.setattr(processes, "ALONE_SECONDS", 0.0)
        with pytest.raises(InputError) as caught:
            plan(recipe_for(tmp_path / f"{name}.zarr", sources=stopped), worker)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "bad.jsonl:2" in said[0]


def test_a_plan_with_skipped_rows_is_made_again_and_extended(
    tmp_path: Path, recipe_for: RecipeMaker, mixed: list[dict[str, Any]]
) -> None:
    recipe = recipe_for(tmp_path / "cache.zarr", sources=mixed[1:2], signals={"distribution": {"rank": 4}})
    made = build(recipe)
    assert made.sources[0].num_skipped_rows == 3
    with (tmp_path / "bad.jsonl").open("a") as file:  # new rows at the end
        file.write(f"(\n{json.dumps({'text': CODE[0]})}\n)\n")
    objects = objects_at(recipe.cache)
    digest = read_plan(objects).digest
    objects.delete(PLAN)
    assert plan(recipe).digest == digest
    grown = extend(recipe)
    assert [(s.num_documents, s.num_skipped_rows) for s in grown.sources] == [(4, 3), (1, 2)]
    assert [row.row for row in grown.sources[1].skipped_rows] == [8, 10]


@pytest.mark.parametrize("split", ["validation", "train"])
def test_a_source_with_nothing_to_predict_is_found_at_plan(
    tmp_path: Path, recipe_for: RecipeMaker, texts: dict[str, Path], split: str
) -> None:
    """Texts of one token have no next one: nothing to validate on, though their distribution can be learned."""
    short = {"name": "short", "split": split, "jsonl": write_jsonl(tmp_path / "short.jsonl", ["a", "b"])}
    sources = [{"name": "train", "jsonl": texts["train"]}, short]
    recipe = recipe_for(tmp_path / "cache.zarr", sources=sources, append_eos=False, signals={"distribution": {"rank": 4}})
    if split == "train":
        assert plan(recipe).sources[1].num_tokens == 2
        return
    with pytest.raises(InputError, match="no token to predict") as caught:
        plan(recipe)
    assert "source short" in str(caught.value)


def gapped_tokenizer() -> PreTrainedTokenizerFast:
    """Whose ids have gaps and go beyond their number."""
    content = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocab: dict[str, int] = content["model"]["vocab"]
    last = max(vocab, key=lambda token: vocab[token])
    for token in (last, "e"):
        vocab[token] = {last: 401, "e": 399}[token]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|end|>", pad_token="<|end|>"
    )


def test_token_ids_beyond_their_number(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    tokenizer = gapped_tokenizer()
    assert len(tokenizer) < vocabulary_size(tokenizer) == 402
    make_model("llama", 402, scale=8.0).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    teacher = {"model": str(tmp_path / "teacher"), "dtype": "float32", "device": "cpu"}
    made = CacheView.of(
        build(recipe_for(tmp_path / "cache.zarr", teacher=teacher, signals={"distribution": {"rank": 8}, "hidden": {}}))
    )
    assert made.manifest.tokenizer.vocab_size == 402
    assert made.manifest.tokenizer.digest == tokenizer_digest(tokenizer)
    segment = open_cache(made.uri)[0]
    assert np.isin([399], np.concatenate([made[n].input_ids for n in range(len(made))])).all()
    assert len(segment.top(5)) and segment.text
    student = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    content = {"cache": made.uri, "out": tmp_path / "run", "student": {"config": {**student, "max_position_embeddings": 64}}}
    losses: dict[str, Any] = {"cross_entropy": {}, "forward_kl": {}}
    stream = {"sequence_length": 48, "global_batch_rows": 2}
    run(RunRecipe.model_validate({**content, "losses": losses, "steps": 2, "stream": stream, "validation": {"every": 2}}))
    assert '"validation_loss"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_too_little_text_to_calibrate_on_is_named(tmp_path: Path, recipe_for: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_jsonl(tmp_path / "tiny.jsonl", ["hello"])
    recipe: CacheRecipe = recipe_for(
        tmp_path / "cache.zarr", sources=[{"name": "tiny", "jsonl": tiny}], signals={"distribution": {}}
    )
    with monkeypatch.context() as patched, pytest.raises(InputError, match="too little text") as caught:
        patched.setattr(distribution, "choose_codec", no_codec)
        build(recipe)
    assert "256 tokens or more" in str(caught.value)
    assert "Give the sources more text." in str(caught.value)


def no_codec(*_arguments: object) -> None:
    raise InputError("no rank meets the bounds of signals.distribution")
