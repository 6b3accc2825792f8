"""A student worth having: a real model with a third of its blocks dropped, healed for as many steps as a time allows, from the
cache and from the text alone: nats on held-out text against steps, over seeds.

The teacher is the folder that `tools/real_model` made; the cache is of its prose. Blocks are dropped evenly from the middle: the
first and the last two stay. Both ways start from the same weights and see the same rows. `--minutes` is a run's training time: a
short run of each way says how long a step takes here, and that is how many steps it gets, rounded down, so that the schedule fits
them. Everything is left in `runs/heal` and goes on where it was stopped: teacher-cache and student-train resume their own.
"""

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table

from model_taps.loading import load_model, load_tokenizer
from model_taps.native_dtype import name_of, native_dtypes
from run_kit.command_line import guarded, keep_freed_memory
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from teacher_cache.commands.build import build
from teacher_cache.recipe import CacheRecipe

WAYS: dict[str, dict[str, Any]] = {
    "text alone": {"losses": {"cross_entropy": {}}},
    "from the cache": {"losses": {"forward_kl": {"temperature": 1.0}}},
    "from the cache, states too": {"losses": {"forward_kl": {"temperature": 1.0}, "lhsm": {"weight": 1.0}}},
    "from the cache, and the text": {"losses": {"forward_kl": {"temperature": 1.0}, "cross_entropy": {"weight": 0.2}}},
}
HIDDEN: dict[str, Any] = {"positions": {"every": 4}, "layers": [6, 12, 18, 24, 30]}
PROBE_STEPS = 4
KEPT_ENDS = 2


def dropped(count: int, share: float) -> list[int]:
    """Numbers of the blocks to drop, from 0, evenly spread between the first and the last KEPT_ENDS."""
    number = round(count * share)
    middle = torch.linspace(KEPT_ENDS, count - 1 - KEPT_ENDS, number)
    return sorted({int(n) for n in middle.round()})


def prune(teacher: str, folder: Path, share: float) -> dict[str, Any]:
    """Write the teacher without a share of its blocks; what was dropped."""
    facts = folder / "dropped.json"
    if facts.exists():
        found: dict[str, Any] = json.loads(facts.read_text())
        return found
    model = load_model(teacher, what="teacher", dtype=torch.float32)
    layers: Any = model.base_model.layers
    gone = dropped(len(layers), share)
    kept = [layer for number, layer in enumerate(layers) if number not in gone]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.base_model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = model.config.layer_types[: len(kept)]
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    load_tokenizer(teacher).save_pretrained(folder)
    found = {"dropped": gone, "kept": len(kept), "parameters": sum(p.numel() for p in model.parameters())}
    facts.write_text(json.dumps(found) + "\n")
    return found


def make_cache(args: argparse.Namespace) -> CacheRecipe:
    """The recipe of the prose's cache, built."""
    sources = []
    for split, tokens in (("train", args.tokens), ("validation", args.validation_tokens)):
        path, characters = args.out / f"{split}.jsonl", 0
        lines = (args.corpus / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        with path.open("w", encoding="utf-8") as file:
            for line in sorted(lines, key=hash_of):
                text = json.loads(line)["text"][: max(0, 4 * tokens - characters)]
                if len(text) > 1:
                    file.write(json.dumps({"text": text}) + "\n")
                    characters += len(text)
        sources.append({"name": split, "split": split, "jsonl": path})
    recipe = CacheRecipe.model_validate(
        {
            "cache": args.out / "cache.zarr",
            "teacher": {"model": args.teacher, "dtype": args.teacher_dtype},
            "sources": sources,
            "context": args.sequence_length,
            "unit_tokens": 16_384,
            "batch_tokens": 4096,
            "signals": {
                "distribution": {"quality": args.quality},
                **({"hidden": HIDDEN} if any("states" in way for way in args.ways) else {}),
            },
        }
    )
    build(recipe)
    return recipe


def hash_of(text: str) -> str:
    """An order of documents that is the same everywhere."""
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def recipe_of(args: argparse.Namespace, way: str, seed: int, steps: int, out: Path) -> RunRecipe:
    return RunRecipe.model_validate(
        {
            "cache": str(args.out / "cache.zarr"),
            "out": str(out),
            "student": {"checkpoint": str(args.out / "student")},
            "steps": steps,
            "seed": seed,
            "precision": args.precision,
            "optimizer": {
                "learning_rate": args.learning_rate,
                "betas": [0.9, 0.95],
                "warmup_steps": max(1, steps // 20),
                "min_factor": 0.1,
            },
            "stream": {"sequence_length": args.sequence_length, "global_batch_rows": args.rows, "workers": 0},
            "validation": {"every": max(1, steps // 8), "max_tokens": args.validation_tokens, "fidelity": False},
            "checkpoint": {"every": max(1, steps // 8), "keep": 1},
            **WAYS[way],
        }
    )


def seconds_a_step(args: argparse.Namespace, way: str) -> float:
    """Of a short run, whose first step is left out: CPU time over threads, the clock of a machine that nobody else uses; remembered."""
    out = args.out / "probe" / way.replace(" ", "-").replace(",", "")
    path = out / "seconds.json"
    if not path.exists():
        times = []
        for steps in (1, 1 + PROBE_STEPS):
            shutil.rmtree(out, ignore_errors=True)
            content = recipe_of(args, way, 0, steps, out).model_copy(update={"validation": None})
            started = time.process_time()
            run(content)
            times.append((time.process_time() - started) / torch.get_num_threads())
        path.write_text(json.dumps((times[1] - times[0]) / PROBE_STEPS))
    seconds: float = json.loads(path.read_text())
    return seconds


def curve_of(folder: Path) -> list[tuple[int, float]]:
    """(step, nats) of a run's validations."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "validation_loss" in row:
            found.append((int(row["step"]), float(row["validation_loss"])))
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for number, (way, runs) in enumerate(found["ways"].items()):
        for seed, own in runs["seeds"].items():
            steps, nats = zip((0, found["unhealed_nats"]), *own["curve"], strict=True)
            axis.plot(steps, nats, marker="o", markersize=3, color=f"C{number}", label=way if seed == min(runs["seeds"]) else None)
    axis.axhline(found["teacher_nats"], color="black", linestyle="--", label="the teacher")
    axis.set(
        xlabel="steps",
        ylabel="nats per token on held-out text",
        title=f"{found['student']['kept']} blocks kept, {found['minutes']:g} minutes a run",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="runs/real_model/model")
    parser.add_argument("--corpus", type=Path, default=Path("runs/real_model/corpus"))
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, for each run")
    parser.add_argument("--seeds", type=int, default=2, help="0 makes student and cache only")
    parser.add_argument("--ways", nargs="*", choices=tuple(WAYS), default=list(WAYS)[:2])
    parser.add_argument("--share", type=float, default=1 / 3, help="of the blocks, that are dropped")
    parser.add_argument("--tokens", type=int, default=200_000, help="of the cache")
    parser.add_argument("--validation-tokens", type=int, default=16_384)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4, help="a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--quality", default="standard")
    parser.add_argument("--teacher-dtype", default="auto", help="of the cache")
    parser.add_argument("--precision", default="auto", help="of the students' products")
    parser.add_argument("--out", type=Path, default=Path("runs/heal"))
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "native_dtypes": {name_of(dtype): why for dtype, why in native_dtypes(torch.device("cpu")).items()},
        "student": prune(args.teacher, args.out / "student", args.share),
        "minutes": args.minutes,
        "tokens_a_step": args.sequence_length * args.rows,
        "quality": args.quality,
        "ways": {},
    }
    make_cache(args)
    found["teacher_nats"] = teacher_nats(args)
    found["unhealed_nats"] = unhealed_nats(args)
    for seed in range(args.seeds):
        for way in args.ways:
            seconds = seconds_a_step(args, way)
            steps = max(8, int(60 * args.minutes / seconds))
            folder = args.out / f"{way.replace(' ', '-').replace(',', '')}-{steps}-{seed}"
            run(recipe_of(args, way, seed, steps, folder))
            own = found["ways"].setdefault(way, {"steps": steps, "seconds_a_step": seconds, "seeds": {}})
            own["seeds"][seed] = {"curve": curve_of(folder)}
            (args.out / "heal.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, args.out / "heal.png")
    table = Table(title=f"nats per token on held-out text; the teacher has {found['teacher_nats']:.3f}")
    for column in ("way", "seed", "steps", "at the start", "at the end"):
        table.add_column(column, justify="right")
    for way, own in found["ways"].items():
        for seed, one in own["seeds"].items():
            table.add_row(way, str(seed), str(own["steps"]), f"{found['unhealed_nats']:.3f}", f"{one['curve'][-1][1]:.3f}")
    Console().print(table)


@torch.inference_mode()
def unhealed_nats(args: argparse.Namespace) -> float:
    """Of the pruned model before any step, on the rows that validation reads."""
    from signal_store.cache import open_cache

    model = load_model(str(args.out / "student"), what="student", dtype=torch.float32)
    cache, total, count = open_cache(str(args.out / "cache.zarr")), 0.0, 0
    for segment in (cache[i] for i in range(cache.first_segment(int(cache.units("validation")[0])), len(cache))):
        ids = torch.from_numpy(segment.input_ids.astype("int64"))
        logp = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(1)
        total -= float(logp.gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
        if count >= args.validation_tokens:
            break
    return total / count


def teacher_nats(args: argparse.Namespace) -> float:
    """Of the validation split, from the cached log-probabilities of its labels."""
    from fidelity_measure import teacher_validation_loss
    from signal_store.cache import open_cache

    return teacher_validation_loss(open_cache(str(args.out / "cache.zarr")))


if __name__ == "__main__":
    guarded(main)
