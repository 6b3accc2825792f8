"""A student with another tokenizer: what each way of comparing it with its teacher gives, in bits per byte of held-out text.

The teacher is the demo's, or any folder (`--teacher`, `--corpus`); its cache is built once. The students are of one size and differ
in tokenizer and objective: with the teacher's own tokenizer, the text alone and forward KL (through a view, where `strict` is that),
which is the line to reach; and with another, of `--vocabulary` tokens, trained here on the cache's text, the text alone and each term
beside it. Every run takes the same number of steps, each of as much text. Left in `runs/across`, and goes on where it was stopped.
"""

import argparse
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo import STUDENT
from model_taps.loading import load_tokenizer
from run_kit.command_line import guarded, keep_freed_memory
from signal_store.cache import Cache, open_cache
from stdlib_corpus import modules
from student_train.align.view import View
from student_train.align.view_maker import make_view
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from teacher_cache.commands.build import build
from teacher_cache.recipe import CacheRecipe

TOOLS = Path(__file__).parent.parent
ALONE: dict[str, Any] = {"cross_entropy": {}}
BESIDE: dict[str, Any] = {"cross_entropy": {"weight": 0.3}}
"""Of a term that says nothing of some rows."""
SAME: dict[str, dict[str, Any]] = {"text alone": ALONE, "forward KL": {"strict": {}, **BESIDE}}
OTHER: dict[str, dict[str, Any]] = {
    "text alone": ALONE,
    "strict": {"strict": {}, **BESIDE},
    "strict, same text": {"strict": {"rows": "same_text"}, **BESIDE},
    "prefix": {"prefix": {}, **BESIDE},
    "likelihood": {"likelihood": {}, **BESIDE},
    "strict and likelihood": {"strict": {}, "likelihood": {}, **BESIDE},
    "uld": {"uld": {}, **BESIDE},
}


def make_cache(args: argparse.Namespace) -> Cache:
    """Of Python's standard library; or of a corpus that `tools/real_model` made."""
    wanted = {"train": args.tokens * 4, "validation": args.validation_tokens * 4}
    for split, characters in wanted.items():
        path = args.out / f"{split}.jsonl"
        if path.exists():
            continue
        if args.corpus is None:
            texts = [module.text for module in modules() if module.split == split and not module.is_test]
        else:
            texts = [json.loads(line)["text"] for line in (args.corpus / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        with path.open("w", encoding="utf-8") as file:
            for text in texts:
                if characters > 0 and len(text) > 1:
                    file.write(json.dumps({"text": text[:characters]}) + "\n")
                    characters -= len(text)
    recipe = {
        "cache": str(args.out / "cache.zarr"),
        "teacher": {"model": args.teacher},
        "sources": [{"name": split, "split": split, "jsonl": str(args.out / f"{split}.jsonl")} for split in wanted],
        "context": args.context,
        "signals": {"distribution": {}},
    }
    build(CacheRecipe.model_validate(recipe))
    return open_cache(recipe["cache"])


def other_tokenizer(args: argparse.Namespace) -> str:
    """A folder with a byte-level BPE of the cache's text, its numbers one by one, whose pieces are not the teacher's."""
    if args.tokenizer is not None:
        return str(args.tokenizer)
    folder = args.out / f"tokenizer-{args.vocabulary}"
    if not folder.is_dir():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=args.vocabulary, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        lines = (args.out / "train.jsonl").read_text(encoding="utf-8").splitlines()
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return str(folder)


def view_of(cache: Cache, tokenizer: str, place: Path) -> View:
    return make_view(cache, load_tokenizer(tokenizer), str(place))


def row_tokens(views: dict[str, View]) -> dict[str, int]:
    """By tokenizer, as long as hold equally many bytes, and any segment."""
    needed = max(view.longest * bytes_per_token(view) for view in views.values())
    return {name: math.ceil(needed / bytes_per_token(view)) for name, view in views.items()}


def bytes_per_token(view: View) -> float:
    return view.rows["text_bytes"] / view.rows["counted"]


def recipe_of(
    args: argparse.Namespace, view: View, length: int, tokenizer: str, losses: dict[str, Any], seed: int, out: Path
) -> RunRecipe:
    """As many steps as read the bytes: a step is `--rows` rows."""
    steps = round(args.megabytes * 2**20 / (args.rows * length * bytes_per_token(view)))
    return RunRecipe.model_validate(
        {
            "cache": str(args.out / "cache.zarr"),
            "out": str(out),
            "student": {"config": {**STUDENT, "max_position_embeddings": view.longest}, "tokenizer": tokenizer, "seed": seed},
            "losses": losses,
            "align": {"view": view.uri, "least_share": 0.0},
            "steps": steps,
            "seed": seed,
            "precision": args.precision,
            "optimizer": {"learning_rate": 1.5e-3, "betas": [0.9, 0.95], "warmup_steps": max(1, steps // 20), "min_factor": 0.02},
            "stream": {"sequence_length": length, "global_batch_rows": args.rows, "workers": 0},
            "validation": {"every": steps},
            "checkpoint": {"every": steps, "keep": 1},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default=str(TOOLS / "demo_teacher"))
    parser.add_argument("--corpus", type=Path, help="a folder with train.jsonl and validation.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="the students' other tokenizer; one is trained, if not given")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of that")
    parser.add_argument("--tokens", type=int, default=300_000, help="of the cache")
    parser.add_argument("--validation-tokens", type=int, default=30_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--megabytes", type=float, default=1.5, help="of text, that every run reads")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/across"))
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    cache = make_cache(args)
    tokenizers = {"the teacher's": args.teacher, "another": other_tokenizer(args)}
    views = {name: view_of(cache, folder, args.out / f"view-{n}") for n, (name, folder) in enumerate(tokenizers.items())}
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, 1 process",
        "megabytes": args.megabytes,
        "alignment": {name: view.rows for name, view in views.items()},
        "rows": [],
    }
    lengths = row_tokens(views)
    ways = [("the teacher's", way, losses) for way, losses in SAME.items()] + [
        ("another", way, losses) for way, losses in OTHER.items()
    ]
    for seed in range(args.seeds):
        for tokenizer, way, losses in ways:
            out = args.out / "runs" / f"{tokenizer.replace(' ', '-')}-{way.replace(' ', '-').replace(',', '')}-{seed}"
            result = run(recipe_of(args, views[tokenizer], lengths[tokenizer], tokenizers[tokenizer], losses, seed, out))
            own = {
                "tokenizer": tokenizer,
                "way": way,
                "seed": seed,
                "bits_per_byte": result["bits_per_byte"],
                "steps": result["steps"],
            }
            found["rows"].append(own | {"tokens_per_second": result["tokens_per_second"]})
            found["summary"] = summary_of(found["rows"])
            (args.out / "across.json").write_text(json.dumps(found, indent=1) + "\n")
    Console().print(table_of(found))


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By tokenizer and way, mean and spread over seeds; what each gains over its text alone, seed by seed."""
    found = []
    for tokenizer, way in dict.fromkeys((row["tokenizer"], row["way"]) for row in rows):
        mine = {r["seed"]: r for r in rows if (r["tokenizer"], r["way"]) == (tokenizer, way)}
        plain = {r["seed"]: r for r in rows if (r["tokenizer"], r["way"]) == (tokenizer, "text alone")}
        bits = [r["bits_per_byte"] for r in mine.values()]
        gains = [plain[seed]["bits_per_byte"] - r["bits_per_byte"] for seed, r in mine.items() if seed in plain]
        found.append(
            {
                "tokenizer": tokenizer,
                "way": way,
                "seeds": len(bits),
                "bits_per_byte": statistics.fmean(bits),
                "sd": statistics.stdev(bits) if len(bits) > 1 else 0.0,
                "gain": statistics.fmean(gains),
                "gain_sd": statistics.stdev(gains) if len(gains) > 1 else 0.0,
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in mine.values()),
            }
        )
    return found


def table_of(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['megabytes']:g} MB of text; the gain is over the text alone with the same tokenizer, by seed")
    for column in ("tokenizer", "way", "bits per byte", "sd", "gain", "sd ", "tokens/s", "seeds"):
        table.add_column(column, justify="right")
    for row in found["summary"]:
        numbers = (f"{row['bits_per_byte']:.4f}", f"{row['sd']:.4f}", f"{row['gain']:+.4f}", f"{row['gain_sd']:.4f}")
        table.add_row(row["tokenizer"], row["way"], *numbers, f"{row['tokens_per_second']:,.0f}", str(row["seeds"]))
    return table


if __name__ == "__main__":
    guarded(main)
