"""What the torture works on: a tiny teacher, texts and a recipe in a folder of their own; and what two caches must share."""

import json
from pathlib import Path
from typing import Any

from teacher_cache.recipe import CacheRecipe
from tests.tiny import CODE, CONTEXT, PROSE, make_model, make_tokenizer, write_jsonl

SIGNALS: dict[str, Any] = {
    "distribution": {"rank": 24, "samples": 2},
    "hidden": {"positions": {"every": 3}},
    "attention": {"previous_steps": 1},
    "stats": {},
    "replay": {"steps": 2, "positions_per_segment": 1},
}


def make_material(folder: Path) -> None:
    """Teacher and texts."""
    tokenizer = make_tokenizer()
    make_model("llama", len(tokenizer), scale=8.0).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    write_jsonl(folder / "train.jsonl", [f"# part {i}\n{text}" for i in range(6) for text in CODE + PROSE])
    write_jsonl(folder / "held.jsonl", [f"# held out {i}\n{text}" for i in range(2) for text in CODE])


def recipe_at(folder: Path, cache: Path) -> CacheRecipe:
    """The recipe of a cache of this material."""
    return CacheRecipe.model_validate(
        {
            "cache": cache,
            "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "device": "cpu"},
            "sources": [
                {"name": "train", "jsonl": folder / "train.jsonl", "lexer": "python"},
                {"name": "held", "split": "validation", "jsonl": folder / "held.jsonl", "lexer": "python"},
            ],
            "context": CONTEXT,
            "unit_tokens": 512,
            "batch_tokens": 192,
            "signals": SIGNALS,
        }
    )


def contents(root: Path) -> dict[str, Any]:
    """Every object's bytes; of a ledger document its body; of seals nothing is left out but the `about` block."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        key = path.relative_to(root).as_posix()
        if path.is_file() and not key.startswith("ledger/workers/"):
            data = path.read_bytes()
            document = key.startswith("ledger/") and key.endswith(".json") and not key.startswith("ledger/tokenizer/")
            found[key] = json.loads(data)["body"] if document else data
    return found
