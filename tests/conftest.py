"""Fixtures: a tiny teacher, texts, and caches made of them, once for all processes of a test run. Tests read them and change copies."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from signal_store.signals import Signals
from signal_view import CacheView, open_cache
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
    from teacher_cache.commands.build import build

settings.register_profile("unhurried", deadline=None)  # wall-clock is never asserted
settings.load_profile("unhurried")


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder by its name, which the first process that asks for it makes; the others wait, and read it."""
    own = tmp_path_factory.getbasetemp()
    base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = base / f"shared-{name}", base / f"shared-{name}.done"
        with (base / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed half way
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def teacher_folder(once: Once, tokenizer: PreTrainedTokenizerFast) -> Path:
    def make(folder: Path) -> None:
        make_model("llama", len(tokenizer), scale=8.0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return once("teacher", make)


@pytest.fixture(scope="session")
def texts(once: Once) -> dict[str, Path]:
    def make(folder: Path) -> None:
        write_jsonl(folder / "train.jsonl", [f"# part {i}\n{text}" for i in range(8) for text in CODE + PROSE])
        held = [f"# held out {i}\n{text}" for i in range(2) for text in (*CODE, PROSE[1])]
        write_jsonl(folder / "validation.jsonl", held)

    folder = once("texts", make)
    return {split: folder / f"{split}.jsonl" for split in ("train", "validation")}


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
def cache(once: Once, recipe_for: RecipeMaker) -> CacheView:
    """A sealed cache with every signal."""
    return open_cache(once("cache", lambda folder: build(recipe_for(folder / "cache.zarr"))) / "cache.zarr")


@pytest.fixture(scope="session")
def exact_cache(once: Once, recipe_for: RecipeMaker) -> CacheView:
    """A sealed cache whose tail is the whole hidden state in 16 bits."""
    signals = {"distribution": {"head": 8, "rank": WIDTH, "tail_bits": 16}, "hidden": {}, "attention": {"heads": HEADS}}
    return open_cache(once("exact", lambda folder: build(recipe_for(folder / "cache.zarr", signals=signals))) / "cache.zarr")


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
def knowing_cache(once: Once, recipe_for: RecipeMaker, texts: dict[str, Path]) -> CacheView:
    """A sealed cache with everything that any term reads, as exact as it can be stored."""

    def make(folder: Path) -> None:
        further: dict[str, Any] = {name: {} for name in Signals.model_fields if name not in EVERY_SIGNAL}
        build(recipe_for(folder / "cache.zarr", signals={**EVERY_SIGNAL, **further}, sources=every_source(folder, texts)))

    return open_cache(once("knowing", make) / "cache.zarr")


def every_source(folder: Path, texts: dict[str, Path]) -> list[dict[str, Any]]:
    """What gives each signal something to be taken at."""
    tagger = {"parser": "pygments"}
    sources = [
        {"name": "train", "jsonl": texts["train"], "lexer": "python", "tagger": tagger},
        {"name": "held-out", "split": "validation", "jsonl": texts["validation"], "lexer": "python", "tagger": tagger},
    ]
    asked = {"prompt": "prompt", "completion": "completion"}
    for task, rows in (("qa", QUESTIONS), ("summary", SUMMARIES)):
        for split, some in (("train", rows[4:]), ("validation", rows[:4])):
            path = write_rows(folder / f"{task}-{split}.jsonl", some)
            part = {"name": f"{task}-{split}", "split": split, "jsonl": path, "task": task, **asked}
            sources.append({**part, "lexer": "python", "tagger": tagger})
    return sources


if not HAS_TORCH:
    from tests.without_torch import cache, teacher_folder  # noqa: F401


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this a machine whose CPU has these flags, which torch uses."""
    from model_taps import native_dtype

    def has(flags: str) -> None:
        monkeypatch.setattr(native_dtype, "cpu_flags", lambda: frozenset(flags.split()))
        monkeypatch.setattr("model_taps.machine.cpu_flags", lambda: frozenset(flags.split()))
        monkeypatch.setattr(native_dtype, "onednn_has", lambda _: True)

    return has
