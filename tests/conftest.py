"""Fixtures: a tiny teacher, texts, and caches made of them once a session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from signal_store.cache import Cache
from teacher_cache.recipe import CacheRecipe
from tests.tiny import (
    CODE,
    CONTEXT,
    HAS_TORCH,
    HEADS,
    PROSE,
    QUESTIONS,
    SUMMARIES,
    WIDTH,
    make_model,
    make_tokenizer,
    write_jsonl,
    write_rows,
)

if HAS_TORCH:
    from teacher_cache.build import build

settings.register_profile("unhurried", deadline=None)  # wall-clock is never asserted
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    make_model("llama", len(tokenizer), scale=8.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    train = [f"# part {i}\n{text}" for i in range(8) for text in CODE + PROSE]
    held = [f"# held out {i}\n{text}" for i in range(2) for text in (*CODE, PROSE[1])]
    return {"train": write_jsonl(folder / "train.jsonl", train), "validation": write_jsonl(folder / "validation.jsonl", held)}


RecipeMaker = Callable[..., CacheRecipe]


@pytest.fixture(scope="session")
def recipe_for(teacher_folder: Path, texts: dict[str, Path]) -> RecipeMaker:
    def make(cache: Path, **changes: Any) -> CacheRecipe:
        content: dict[str, Any] = {
            "cache": cache,
            "teacher": {"model": str(teacher_folder), "dtype": "float32", "device": "cpu"},
            "sources": [
                {"name": "train", "jsonl": texts["train"], "lexer": "python"},
                {"name": "held-out", "split": "validation", "jsonl": texts["validation"], "lexer": "python"},
            ],
            "context": CONTEXT,
            "unit_tokens": 1024,
            "batch_tokens": 192,
            "signals": {"distribution": {"rank": 24}, "hidden": {}, "attention": {}},
        }
        content = {key: value for key, value in {**content, **changes}.items() if value is not None}
        return CacheRecipe.model_validate(content)

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeMaker) -> Cache:
    """A sealed cache with every signal."""
    return build(recipe_for(tmp_path_factory.mktemp("cache") / "cache.zarr"))


@pytest.fixture(scope="session")
def exact_cache(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeMaker) -> Cache:
    """A sealed cache whose tail is the whole hidden state in 16 bits."""
    signals = {"distribution": {"head": 8, "rank": WIDTH, "tail_bits": 16}, "hidden": {}, "attention": {"heads": HEADS}}
    return build(recipe_for(tmp_path_factory.mktemp("exact") / "cache.zarr", signals=signals))


EVERY_SIGNAL: dict[str, Any] = {
    "distribution": {"rank": WIDTH, "tail_bits": 16},
    "hidden": {
        "taps": ["block_input", "attention_output", "ffn_input", "ffn_gate", "block_output"],
        "layers": [2, 3],
        "values": "float16",
    },
    "attention": {"heads": HEADS, "previous_steps": 3},
    "stats": {"layers": [1, 4]},
    "replay": {"positions_per_segment": 4},
    "evidence": {"layers": [1, 4]},
    "coverage": {},
}


@pytest.fixture(scope="session")
def knowing_cache(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeMaker, texts: dict[str, Path]) -> Cache:
    """A sealed cache with everything that any term reads, as exact as it can be stored."""
    tagger = {"parser": "pygments"}
    sources = [
        {"name": "train", "jsonl": texts["train"], "lexer": "python", "tagger": tagger},
        {"name": "held-out", "split": "validation", "jsonl": texts["validation"], "lexer": "python", "tagger": tagger},
    ]
    asked = {"prompt": "prompt", "completion": "completion"}
    for task, rows in (("qa", QUESTIONS), ("summary", SUMMARIES)):
        for split, some in (("train", rows[4:]), ("validation", rows[:4])):
            path = write_rows(tmp_path_factory.mktemp(task) / f"{split}.jsonl", some)
            part = {"name": f"{task}-{split}", "split": split, "jsonl": path, "task": task, **asked}
            sources.append({**part, "lexer": "python", "tagger": tagger})
    return build(recipe_for(tmp_path_factory.mktemp("knowing") / "cache.zarr", signals=EVERY_SIGNAL, sources=sources))


if not HAS_TORCH:
    from tests.without_torch import cache, teacher_folder  # type: ignore[no-redef]  # noqa: F401
