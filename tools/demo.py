"""The demo: a teacher speaks once into a cache; then it is gone, and two students learn: from the text alone, and from the cache.

Both students have the same initial weights, see the same rows in the same order, and take the same steps. Everything is left
in `runs/demo`: the cache, the runs, `summary.json`, `curves.png`. Started again it goes on where it stopped; `--fresh` starts anew.
The default size is what one pair of students reads once in 150 steps, and ends within six minutes on two cores without bfloat16 units;
`--full` caches six times as much text, and trains for 200. Teacher and students compute in bfloat16 where this CPU does so natively.
"""

import argparse
import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from model_taps.loading import load_tokenizer
from model_taps.machine import MachineClass
from run_kit.command_line import guarded, keep_freed_memory
from signal_store.cache import Cache, open_cache
from signal_store.errors import MismatchError, NotFoundError
from stdlib_corpus import Split, modules

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tools" / "demo_teacher"
OUT = ROOT / "runs" / "demo"
AWAY = OUT / "teacher_while_students_train"
SIZES: dict[str, dict[Split, int]] = {
    "default": {"train": 160_000, "validation": 20_000},
    "full": {"train": 960_000, "validation": 30_000},
}
"""Tokens of each split; students read 1,024 of the first a step."""
STEPS = {"default": 150, "full": 200}
TEMPERATURES = (1.0, 2.0, 3.0)
STUDENT = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
BASELINE, DISTILLED = "cross_entropy", "from_cache"

console = Console(stderr=True)


def cache_recipe() -> dict[str, Any]:
    sources = [
        {"name": split, "split": split, "jsonl": str(OUT / f"{split}.jsonl"), "lexer": "python"}
        for split in ("train", "validation")
    ]
    return {
        "cache": str(OUT / "cache.zarr"),
        "teacher": {"model": str(TEACHER)},
        "context": 256,
        "sources": sources,
        "signals": {"distribution": {}, "hidden": {"rank": 32, "positions": {"every": 8}}, "attention": {}},
    }


def run_recipe(preset: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    return {
        "cache": str(OUT / "cache.zarr"),
        "out": str(out),
        "preset": preset,
        "student": {"config": STUDENT, "seed": seed},
        "steps": steps,
        "seed": seed,
        "optimizer": {"learning_rate": 1.5e-3, "betas": [0.9, 0.95], "warmup_steps": steps // 20, "min_factor": 0.02},
        "stream": {"sequence_length": 256, "global_batch_rows": 4, "seed": seed},
        "validation": {"every": max(1, steps // 4)},
        "checkpoint": {"every": max(1, steps // 2), "keep": 1},
    }


def write_corpus(wanted: dict[Split, int]) -> None:
    """Modules of the standard library, without tests, in an order of their name's hash, until there are tokens enough; once."""
    written = OUT / "size.json"
    if written.exists() or (OUT / "validation.jsonl").exists():
        found = json.loads(written.read_text()) if written.exists() else "one of before there were sizes"
        if found != wanted:
            what = "the demo was begun in another size"
            raise MismatchError(what, expected=wanted, found=found, where=OUT, remedy="Add --fresh.")
        return
    tokenizer = load_tokenizer(str(TEACHER))
    chosen = sorted((m for m in modules() if not m.is_test), key=lambda m: hashlib.sha256(m.name.encode()).digest())
    for split, tokens in wanted.items():
        written_tokens = 0
        with (OUT / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for module in chosen:
                if module.split == split and written_tokens < tokens:
                    written_tokens += len(tokenizer.backend_tokenizer.encode(module.text).ids) + 1
                    file.write(json.dumps({"name": module.name, "text": module.text}) + "\n")
    written.write_text(json.dumps(wanted))


@contextlib.contextmanager
def teacher_gone() -> Iterator[None]:
    """Move the teacher's folder away, and put it back whatever happens."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    TEACHER.rename(AWAY)
    try:
        yield
    finally:
        put_teacher_back()


def put_teacher_back() -> None:
    if AWAY.is_dir():
        AWAY.rename(TEACHER)


def call(command: list[str]) -> None:
    """Run one of our own commands; its progress bars and errors go to the terminal."""
    finished = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def train(preset: str, name: str, seed: int, steps: int) -> dict[str, Any]:
    out = OUT / "students" / f"{name}-{preset}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    recipe = OUT / "students" / f"{out.name}.yaml"
    recipe.write_text(yaml.safe_dump(run_recipe(preset, seed, steps, out)))
    console.print(f"student [bold]{name}[/] (preset {preset}, seed {seed}), the teacher is gone")
    call(["student_train.cli", "run", str(recipe)])
    result = json.loads((out / "result.json").read_text())
    return {
        "name": name,
        "preset": preset,
        "seed": seed,
        "val_loss": result["validation_loss"],
        "tokens_per_second": result["tokens_per_second"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "steps": result["steps"],
        "folder": str(out),
    }


def plot(students: list[dict[str, Any]], teacher_loss: float, target: Path) -> None:
    """Validation loss of both students over steps, and the teacher's as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colours = {BASELINE: "#b5541c", DISTILLED: "#1f5fa8"}
    labels = {BASELINE: "student, cross-entropy alone", DISTILLED: "student, from the cache"}
    for student in students:
        records = [json.loads(line) for line in (Path(student["folder"]) / "metrics.jsonl").read_text().splitlines()]
        points = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
        label = labels[student["name"]] if student["seed"] == 0 else None
        axes.plot(*zip(*points, strict=True), color=colours[student["name"]], marker="o", markersize=3, label=label)
    axes.axhline(teacher_loss, color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set(
        xlabel="optimizer steps", ylabel="validation loss (nats per token)", title="Held-out modules of Python's standard library"
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def show(summary: dict[str, Any]) -> None:
    table = Table(title="What the students know", caption=f"teacher: {summary['teacher']['val_loss']:.3f} nats/token")
    for column in ("student", "seed", "val loss (nats/token)", "gain", "tokens/s", "peak memory (MiB)"):
        table.add_column(column, justify="left" if column == "student" else "right")
    baseline = {s["seed"]: s["val_loss"] for s in summary["students"] if s["name"] == BASELINE}
    for s in summary["students"]:
        gain = "" if s["name"] == BASELINE else f"{baseline[s['seed']] - s['val_loss']:+.3f}"
        memory = f"{s['peak_rss_bytes'] / 2**20:,.0f}"
        table.add_row(s["name"], str(s["seed"]), f"{s['val_loss']:.3f}", gain, f"{s['tokens_per_second']:,.0f}", memory)
    sizes = summary["fidelity"]["bytes_per_token"]
    table.add_section()
    out = Console()
    out.print(table)
    fidelity = Table(
        title="How faithful the cache is", caption="bytes per token: " + ", ".join(f"{k} {v:.1f}" for k, v in sizes.items())
    )
    for column in ("temperature", "mean KL (nats)", "gradient angle (degrees)", "norm ratio"):
        fidelity.add_column(column, justify="right")
    for t, row in summary["fidelity"]["temperatures"].items():
        fidelity.add_row(t, f"{row['mean_kl_nats']:.2e}", f"{row['angle_degrees']:.3f}", f"{row['norm_ratio']:.4f}")
    out.print(fidelity)
    out.print(f"cache: {OUT / 'cache.zarr'}\nsummary: {OUT / 'summary.json'}\nplot: {OUT / 'curves.png'}")


def summarize(cache: Cache, students: list[dict[str, Any]], build_seconds: float) -> dict[str, Any]:
    from fidelity_measure import bytes_per_token, demo_fidelity, teacher_validation_loss

    baseline = next(s for s in students if s["name"] == BASELINE)
    found = demo_fidelity(cache, TEACHER, Path(baseline["folder"]) / "student", TEMPERATURES, min_tokens=6000)
    tokens = {source.split: source.num_tokens for source in cache.manifest.sources}
    return {
        "teacher": {
            "folder": str(TEACHER),
            "val_loss": teacher_validation_loss(cache),
            "weights_digest": cache.manifest.teacher.weights_digest,
            "dtype": cache.manifest.teacher.dtype,
        },
        "cache": {
            "path": cache.uri,
            "cache_id": cache.manifest.cache_id,
            "tokens": tokens,
            "segments": len(cache),
            "tail_rank": cache.manifest.calibration.tail_rank,
            "build_seconds": build_seconds,
        },
        "students": students,
        "fidelity": {
            "bytes_per_token": bytes_per_token(cache),
            "temperatures": {
                f"{t:g}": {
                    "mean_kl_nats": row.mean_kl_nats,
                    "angle_degrees": row.angle_degrees["forward_kl"],
                    "norm_ratio": row.norm_ratio["forward_kl"],
                    "tokens": row.tokens,
                }
                for t, row in found.items()
            },
        },
    }


def demo(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    put_teacher_back()  # an earlier demo may have been killed
    if not (TEACHER / "config.json").is_file():
        raise NotFoundError("no demo teacher", expected=TEACHER, remedy="Run tools/make_demo_teacher.")
    if args.fresh and OUT.exists():
        shutil.rmtree(OUT)
    OUT.mkdir(parents=True, exist_ok=True)
    size = "full" if args.full else "default"
    write_corpus(SIZES[size])
    (OUT / "cache.yaml").write_text(yaml.safe_dump(cache_recipe()))
    console.print("the teacher speaks")
    before = time.perf_counter()
    call(["teacher_cache.cli", "build", str(OUT / "cache.yaml")])
    build_seconds = time.perf_counter() - before
    with teacher_gone():
        students = [
            train(preset, name, seed, args.steps or STEPS[size])
            for seed in range(args.seeds)
            for name, preset in ((BASELINE, "cross_entropy"), (DISTILLED, args.preset))
        ]
    cache = open_cache(OUT / "cache.zarr")
    summary = summarize(cache, students, build_seconds)
    machine = MachineClass.of("cpu")
    summary |= {"seconds": time.perf_counter() - started, "machine": machine.facts()}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1))
    plot(students, summary["teacher"]["val_loss"], OUT / "curves.png")
    show(summary)
    units, dtype = " ".join(machine.units) or "no known units", summary["teacher"]["dtype"]
    print(f"took {summary['seconds']:.0f} seconds with {machine.threads} threads on {units}, the teacher in {dtype}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="train this many pairs of students")
    parser.add_argument(
        "--preset",
        default="forward_kl",
        choices=["forward_kl", "logits_hidden_attention"],
        help="objective of the student that learns from the cache",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each student; 150, or 200 with --full")
    parser.add_argument("--full", action="store_true", help="cache 960,000 tokens instead of 160,000")
    parser.add_argument("--fresh", action="store_true", help="remove runs/demo first")
    keep_freed_memory()
    guarded(lambda: demo(parser.parse_args()))


if __name__ == "__main__":
    main()
