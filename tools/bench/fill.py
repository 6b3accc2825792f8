"""What dumping costs: the same teacher's forward passes with its output head, without and with every default signal's extraction,
encoding and writing, batch by batch in turns, in one run.

The teacher has random weights. Prints a table and JSON: seconds a batch, the overhead, and the peak memory of a worker for two sizes
of corpus and of unit.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from run_kit.command_line import guarded, keep_freed_memory
from signal_store.io.local import LocalObjects
from stdlib_corpus import modules
from teacher_cache.builder.calibrate import Calibrated, batches_of
from teacher_cache.builder.fill import UnitWriters
from teacher_cache.commands.calibrate import calibrate
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.batch import extract_batch, plan_rows
from teacher_cache.signals.unit_work import LOGITS_BYTES, UnitWork
from teacher_cache.teacher.forward import forward

TOKENIZER = Path(__file__).parent.parent / "demo_teacher"


def make_teacher(folder: Path, vocab_size: int, width: int, layers: int) -> int:
    """A Qwen3 of random weights with the demo's tokenizer, filled up to `vocab_size` tokens; number of its parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(TOKENIZER).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab |= {f"<unused {n}>": n for n in range(max(vocab.values()) + 1, vocab_size)}
    path.write_text(json.dumps(content))
    return sum(p.numel() for p in model.parameters())


def recipe_of(folder: Path, name: str, characters: int, unit_tokens: int) -> CacheRecipe:
    """A cache of the first characters of the standard library, default signals."""
    texts, taken = folder / f"{name}.jsonl", 0
    with texts.open("w") as file:
        for module in modules():
            if taken < characters:
                file.write(json.dumps({"text": module.text}) + "\n")
                taken += len(module.text)
    return CacheRecipe.model_validate(
        {
            "cache": folder / f"{name}.zarr",
            "teacher": {"model": str(folder / "teacher"), "device": "cpu"},
            "sources": [{"name": "code", "jsonl": texts, "lexer": "python"}],
            "context": 1024,
            "unit_tokens": unit_tokens,
            "batch_tokens": 4096,
            "calibration": {"tokens_per_source": 2048},
            "signals": {"distribution": {"rank": 64}, "hidden": {"rank": 64, "positions": {"every": 4}}, "attention": {}},
        }
    )


@torch.inference_mode()
def forward_only(calibrated: Calibrated, work: UnitWork, batch: Any) -> None:
    """The teacher's own work: backbone and logits of every token, in the chunks that extraction uses; nothing is kept."""
    outputs = forward(calibrated.teacher, work.plan, batch)
    head = calibrated.teacher.head
    assert head is not None
    step = max(1, LOGITS_BYTES["cpu"] // (4 * calibrated.teacher.vocab_size))
    for start in range(0, len(outputs.hidden), step):
        head.logits(outputs.hidden[start : start + step])


def overhead(recipe: CacheRecipe, batches: int) -> dict[str, Any]:
    """Seconds of each batch both ways, in turns; the writing of a batch overlaps what comes next, as in fill."""
    calibrated = calibrate(recipe)
    objects = LocalObjects(recipe.cache)
    work = UnitWork(0, calibrated.plan.unit(objects, 0))
    chosen = batches_of(calibrated, work.plan)[: batches + 1]
    plain, dumped, tokens = [], [], 0
    with UnitWriters(objects, "ledger/staging/bench", calibrated.manifest.specs, 0) as writers:
        writers.append(plan_rows(calibrated, work))
        for number, batch in enumerate(chosen):
            started = time.perf_counter()
            forward_only(calibrated, work, batch)
            between = time.perf_counter()
            writers.append_later(extract_batch(calibrated, work, batch))
            ended = time.perf_counter()
            if number:  # the first warms up
                plain.append(between - started)
                dumped.append(ended - between)
                tokens += int(work.plan.length[batch.first : batch.last].sum())
    return {
        "batches": len(plain),
        "tokens": tokens,
        "forward_seconds": sum(plain),
        "dump_seconds": sum(dumped),
        "overhead": statistics.median(d / p for d, p in zip(dumped, plain, strict=True)) - 1,
        "tail_rank": calibrated.manifest.calibration.tail_rank,
    }


def peak_bytes(recipe: CacheRecipe, answer: Any) -> None:
    """Fill a cache in a process of its own and say its peak memory."""
    from teacher_cache.commands.fill import fill

    keep_freed_memory()
    fill(recipe)
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="also fill three small caches and compare peak memory")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_teacher(folder / "teacher", args.vocab_size, args.width, args.layers)
        found = overhead(recipe_of(folder, "overhead", 400_000, 65_536), args.batches)
        found |= {
            "parameters": parameters,
            "vocab_size": args.vocab_size,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        if args.memory:
            found["peak_bytes"] = {}
            context = multiprocessing.get_context("spawn")
            for label, characters, unit in (
                ("small", 100_000, 16_384),
                ("4x corpus", 400_000, 16_384),
                ("4x unit", 400_000, 65_536),
            ):
                answer = context.Queue()
                process = context.Process(
                    target=peak_bytes, args=(recipe_of(folder, label.replace(" ", "-"), characters, unit), answer)
                )
                process.start()
                found["peak_bytes"][label] = answer.get()
                process.join()
    table = Table(title=f"a teacher of {parameters / 1e6:.0f}M parameters, {args.vocab_size:,} tokens of vocabulary")
    for column in ("tokens", "forward + head, s", "with dumping, s", "overhead"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{found['tokens']:,}",
        f"{found['forward_seconds']:.2f}",
        f"{found['dump_seconds']:.2f}",
        f"{100 * found['overhead']:.1f} %",
    )
    Console().print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fill.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    guarded(main)
