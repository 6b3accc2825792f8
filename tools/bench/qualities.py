"""What a student keeps at each named quality: students of the demo's kind, same weights, rows, order and steps, from the cached
distribution at every quality, from the live teacher, and from the text alone.

Rows, order and tokens are those of a cache of the demo's teacher (of any quality): its distribution is not used. Every quality's
codec is chosen as calibration does, on the teacher's states of the first steps, and the states of every step are encoded with it.
Each student's end is kept in the JSON as it comes, so that the bench goes on where it was stopped.
"""

import argparse
import json
import platform
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parity import TOOLS, Room, cross_entropy, distillkit, enter, from_cache, live, train
from run_kit.command_line import guarded, keep_freed_memory
from signal_store.cache import open_cache
from signal_store.signals import QUALITIES, DistributionSignal, Quality
from student_train.data.codecs import Codecs
from student_train.data.signals.distribution import DistributionPart
from teacher_cache.signals.budget import FIT_TOKENS_PER_CHANNEL, HELD_OUT_TOKENS
from teacher_cache.signals.tail.basis import TailFit
from teacher_cache.signals.tail.choice import Choice, choose_codec


@dataclass(frozen=True)
class Recoded:
    """The room as a cache of a quality would give it, and what calibration chose."""

    room: Room
    choice: Choice


@torch.no_grad()
def recoded(room: Room, quality: Quality) -> Recoded:
    """The same rows, their distribution encoded anew."""
    vocab, width = room.cache.manifest.tokenizer.vocab_size, room.head.weight.shape[1]
    bias = None if room.head.bias is None else room.head.bias[:vocab]
    head = replace(room.head, weight=room.head.weight[:vocab], bias=bias)
    signal = DistributionSignal.model_validate({"quality": quality})
    states = torch.cat([thought for _, thought in room.steps]).float()
    fit = FIT_TOKENS_PER_CHANNEL[1] * width
    choice = choose_codec(TailFit.of(states[:fit], head, signal), head, signal, states[fit : fit + HELD_OUT_TOKENS[2]])
    steps = []
    for batch, thought in room.steps:
        codes, _ = choice.codec.encode(thought.float(), head.logits(thought), batch.labels.clamp(min=-1))
        steps.append((batch.with_parts(DistributionPart(codes)), thought))
    return Recoded(replace(room, steps=steps, codecs=Codecs(choice.codec)), choice)


def summary_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By way: mean, standard deviation and number of ends; mean and standard error of the difference from the live teacher, seed
    by seed."""
    ends: dict[str, dict[int, float]] = {}
    for row in rows:
        ends.setdefault(row["way"], {})[row["seed"]] = row["nats"]
    found = {}
    for way, values in ends.items():
        nats = list(values.values())
        pairs = [values[seed] - ends["live teacher"][seed] for seed in values if seed in ends.get("live teacher", {})]
        found[way] = {"mean": statistics.fmean(nats), "sd": statistics.stdev(nats) if len(nats) > 1 else 0.0, "seeds": len(nats)}
        if pairs:
            error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
            found[way] |= {"minus live": statistics.fmean(pairs), "standard error": error}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="runs/demo/cache.zarr")
    parser.add_argument("--teacher", default=str(TOOLS / "demo_teacher"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--validation-tokens", type=int, default=32_768)
    parser.add_argument("--distillkit", type=Path, help="a checkout of arcee-ai/DistillKit")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "qualities.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": [], "qualities": {}}
    found["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    room = enter(open_cache(args.cache), args.teacher, args.steps, args.rows, args.validation_tokens)
    ways = {"cross-entropy": (room, cross_entropy(room)), "live teacher": (room, live(room, 1.0))}
    for quality in QUALITIES:
        own = recoded(room, quality)
        ways[quality] = (own.room, from_cache(own.room, 1.0))
        chosen, fidelity = own.choice.codec, own.choice.fidelity
        found["qualities"][quality] = {
            "head": chosen.head,
            "rank": chosen.rank,
            "bytes_per_token": own.choice.bytes_per_token,
            "scaled_kl_nats": fidelity.scaled_kl_nats,
            "angle_degrees": fidelity.angle_degrees,
        }
    if args.distillkit is not None:
        ways["DistillKit"] = (room, distillkit(room, 1.0, args.distillkit))
    done = {(row["way"], row["seed"]) for row in found["rows"]}
    for seed in range(args.seeds):
        for way, (own_room, loss) in ways.items():
            if (way, seed) not in done:
                found["rows"].append({"way": way, "seed": seed, "nats": train(own_room, seed, loss)})
                found["summary"] = summary_of(found["rows"])
                path.write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"nats on held-out text after {args.steps} steps of {args.rows * room.cache.manifest.plan.context} tokens")
    for column in ("way", "bytes a token", "nats", "sd", "minus live", "standard error", "seeds"):
        table.add_column(column, justify="right")
    for way, row in found["summary"].items():
        size = found["qualities"].get(way, {}).get("bytes_per_token")
        cells = ["" if size is None else f"{size:.0f}", f"{row['mean']:.4f}", f"{row['sd']:.4f}"]
        table.add_row(way, *cells, f"{row['minus live']:+.4f}", f"{row['standard error']:.4f}", str(row["seeds"]))
    Console().print(table)


if __name__ == "__main__":
    guarded(main)
