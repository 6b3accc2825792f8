"""What calibration costs beside the build it belongs to: seconds of every stage on a real teacher, and what its products would
take of a wide one.

The cache is of prose (`prose_corpus`) and default signals but for what is given; a stage's seconds are wall clock, and CPU time
of this process, which says more where the machine is shared. The extrapolation takes the rate at which this machine did this
calibration's products.
"""

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from run_kit.command_line import guarded, keep_freed_memory
from signal_store.io.objects import objects_at
from signal_store.ledger.documents import CALIBRATION, read_document
from teacher_cache.builder.fill import fill_units
from teacher_cache.builder.flops import forward_flops
from teacher_cache.commands.calibrate import calibrate
from teacher_cache.commands.plan import plan
from teacher_cache.commands.seal import seal
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.budget import FIT_TOKENS_PER_CHANNEL, HELD_OUT_TOKENS
from teacher_cache.signals.tail.cost import fit_flops, search_flops
from teacher_cache.worker import ALONE

WIDE = {"width": 4096, "vocab_size": 152_064}


def recipe_of(args: argparse.Namespace) -> CacheRecipe:
    """The first documents of the corpus until there are tokens enough."""
    texts, characters = args.out / "calibration-texts.jsonl", 0
    with texts.open("w", encoding="utf-8") as file:
        for line in (args.corpus / "train.jsonl").open(encoding="utf-8"):
            text = json.loads(line)["text"][: max(0, 4 * args.tokens - characters)]
            if text:
                file.write(json.dumps({"text": text}) + "\n")
                characters += len(text)
    return CacheRecipe.model_validate(
        {
            "cache": args.out / "calibration.zarr",
            "teacher": {"model": args.teacher, "dtype": "float32"},
            "sources": [{"name": "prose", "jsonl": texts}],
            "context": 512,
            "unit_tokens": 16_384,
            "batch_tokens": 4096,
            "signals": {"distribution": json.loads(args.distribution)},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="runs/real_model/model")
    parser.add_argument("--corpus", type=Path, default=Path("runs/real_model/corpus"))
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--distribution", default='{"quality": "standard"}', help="signals.distribution, as JSON")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(args)
    shutil.rmtree(recipe.cache, ignore_errors=True)
    stages: dict[str, dict[str, float]] = {}
    found: dict[str, Any] = {}
    for name, stage in (
        ("plan", lambda: plan(recipe)),
        ("calibrate", lambda: calibrate(recipe)),
        ("fill", lambda: fill_units(found["calibrate"], objects_at(recipe.cache), ALONE)),
        ("seal", lambda: seal(recipe.cache)),
    ):
        wall, cpu = time.perf_counter(), time.process_time()
        found[name] = stage()
        stages[name] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    calibrated = found["calibrate"]
    body = read_document(objects_at(recipe.cache), CALIBRATION).body
    width, vocab = calibrated.teacher.identity.hidden_size, calibrated.teacher.vocab_size
    held = body["fidelity"]["tokens"]
    heads = 4 if recipe.signals.distribution is not None and recipe.signals.distribution.head == "auto" else 1
    own = {
        "forward": forward_flops(recipe, body["num_tokens"]),
        "fit": fit_flops(width, vocab, body["num_tokens"] - held),
        "search": search_flops(width, vocab, held, heads),
    }
    most = WIDE["width"] * FIT_TOKENS_PER_CHANNEL[1]
    wide = {
        "fit": fit_flops(WIDE["width"], WIDE["vocab_size"], most),
        "search": search_flops(WIDE["width"], WIDE["vocab_size"], HELD_OUT_TOKENS[2], heads),
    }
    rate = sum(own.values()) / stages["calibrate"]["cpu_seconds"]
    share = {n: stages["calibrate"][n] / sum(s[n] for s in stages.values()) for n in ("seconds", "cpu_seconds")}
    summary = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "tokens": sum(s.num_tokens for s in calibrated.plan.sources),
        "calibration_tokens": body["num_tokens"],
        "stages": stages,
        "share": share,
        "flops": own,
        "flops_per_cpu_second": rate,
        "wide": {**WIDE, "tokens": most + HELD_OUT_TOKENS[2], "flops": wide, "cpu_hours_here": sum(wide.values()) / rate / 3600},
        "chosen": {"head": body["head"], "rank": body["tail_rank"], **body["fidelity"]},
    }
    table = Table(title=f"{summary['tokens']:,} tokens, of which calibration read {body['num_tokens']:,}")
    for column in ("stage", "seconds", "CPU seconds"):
        table.add_column(column, justify="right")
    for name, stage_seconds in stages.items():
        table.add_row(name, f"{stage_seconds['seconds']:.1f}", f"{stage_seconds['cpu_seconds']:.1f}")
    Console().print(table)
    print(json.dumps({name: summary[name] for name in ("share", "flops", "flops_per_cpu_second", "wide", "chosen")}, indent=1))
    (args.out / "calibration.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    guarded(main)
