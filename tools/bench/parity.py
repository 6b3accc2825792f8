"""A student from the cache against the same student with the teacher in the room: same weights, rows, order and steps.

(i) cross-entropy alone, (ii) forward KL from the cache, (iii) exact full-vocabulary KL to the live teacher; (iv), given a checkout of
DistillKit, its compressed targets through its own sparse loss. Two measures: along the live run, the angle and the ratio of norms between
the cached and the live gradient of all parameters, at T = 1, 2, 3; and the validation loss at the end, over seeds of the student.
The teacher reads every row once and is remembered: nothing of the live runs' numbers depends on that.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.head import OutputHead, final_hidden, output_head
from model_taps.loading import load_model
from peers_distillkit import RECOMMENDED, DistillKit
from run_kit.command_line import guarded, keep_freed_memory
from run_kit.progress import progress_bar
from signal_store.cache import Cache, open_cache
from signal_store.codecs.bf16_units import has_bf16_units
from step import make_student
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.request import SignalRequest
from student_train.data.sections import StreamSection
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.data.stream import Stream
from student_train.evaluate.validation import batch_sums
from student_train.losses.forward_kl import ForwardKl
from student_train.losses.head_terms import OutputTargets, OutputTerm
from student_train.losses.objective import resolve
from student_train.losses.output_head import output_loss
from student_train.losses.section import Losses
from student_train.model.distiller import Distiller
from student_train.train.optimizer import build_optimizer, learning_rate_factor
from student_train.train.sections import OptimizerSection

TOOLS = Path(__file__).parent.parent
TEMPERATURES = (1.0, 2.0, 3.0)
NEEDS = SignalRequest.of(DistributionRequest())
Loss = Callable[[PreTrainedModel, CodedBatch, Tensor], Tensor]
"""From student, batch and the teacher's final hidden states [N, D] to the mean loss."""


@dataclass(frozen=True)
class Room:
    """The cache, the rows of every step, and what the teacher thought of them: final hidden states [N, D] in its dtype."""

    cache: Cache
    codecs: Codecs
    head: OutputHead
    steps: list[tuple[CodedBatch, Tensor]]
    held_out: list[CodedBatch]


@torch.no_grad()
def enter(cache: Cache, teacher_folder: str, steps: int, rows: int, validation_tokens: int) -> Room:
    teacher = load_model(teacher_folder, what="teacher", dtype=getattr(torch, cache.manifest.teacher.dtype))
    config = StreamSection(sequence_length=cache.manifest.plan.context, global_batch_rows=rows, workers=0)
    stream = Stream(cache, NEEDS, config, packed=True)
    found = []
    with progress_bar() as progress:
        bar = progress.add_task("the teacher reads", total=steps, unit="steps")
        for batch in islice(stream.micro_batches({}, 0), steps):
            found.append((batch, final_hidden(teacher, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.flat]))
            progress.advance(bar)
    held = list(stream.once("validation", max_tokens=validation_tokens))
    return Room(cache, Codecs.of(cache, NEEDS, torch.device("cpu")), output_head(teacher).float(), found, held)


def student_hidden(student: PreTrainedModel, batch: CodedBatch) -> Tensor:
    return final_hidden(student, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.flat]


def cross_entropy(_room: Room) -> Loss:
    def loss(student: PreTrainedModel, batch: CodedBatch, _thought: Tensor) -> Tensor:
        term = OutputTerm(None, 1 / max(1, int((batch.labels >= 0).sum())))
        return output_loss(student_hidden(student, batch), output_head(student), OutputTargets(batch.labels), [term])[0]

    return loss


def from_cache(room: Room, temperature: float) -> Loss:
    def loss(student: PreTrainedModel, batch: CodedBatch, _thought: Tensor) -> Tensor:
        part = batch.part(DistributionPart)
        targets = OutputTargets(batch.labels, None if part is None else part.codes, room.codecs.distribution)
        term = OutputTerm(ForwardKl(), 1 / len(batch.flat), temperature)
        return output_loss(student_hidden(student, batch), output_head(student), targets, [term])[0]

    return loss


def live(room: Room, temperature: float) -> Loss:
    def loss(student: PreTrainedModel, batch: CodedBatch, thought: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = (room.head.logits(thought)[:, : room.cache.manifest.tokenizer.vocab_size] / temperature).log_softmax(1)
        weight = output_head(student).weight
        logits = F.linear(student_hidden(student, batch), weight).float() / temperature
        return temperature**2 * F.kl_div(logits.log_softmax(1), log_p, reduction="batchmean", log_target=True)

    return loss


def distillkit(room: Room, temperature: float, checkout: Path) -> Loss:
    """Its recommended setting and missing-mass mode; decoded by its own code, its own loss, times T² as ours."""
    import importlib

    peer = DistillKit(checkout)
    compressor = peer.codec(room.cache.manifest.tokenizer.vocab_size, RECOMMENDED, normalize_t=True)
    sparse_kl = importlib.import_module("distillkit.lossfuncs.kl").sparse_kl_div_inner
    missing = importlib.import_module("distillkit.missing_probability").MissingProbabilityHandling("symmetric_uniform")
    packed: dict[int, dict[str, Tensor]] = {}  # what it would have stored, compressed once for each step

    def loss(student: PreTrainedModel, batch: CodedBatch, thought: Tensor) -> Tensor:
        with torch.no_grad():
            if id(batch) not in packed:
                log_p = room.head.logits(thought)[:, : room.cache.manifest.tokenizer.vocab_size].log_softmax(1)
                packed[id(batch)] = compressor.compress(log_p[None])
            ids, values = compressor.decompress_to_sparse(packed[id(batch)])
        logits = F.linear(student_hidden(student, batch), output_head(student).weight).float()
        total: Tensor = sparse_kl(logits[None], ids, values.float(), missing=missing, temperature=temperature)
        return temperature**2 * total / len(batch.flat)

    return loss


def train(room: Room, seed: int, loss: Loss, look: Callable[[int, PreTrainedModel], None] | None = None) -> float:
    """Train a student as the demo does; its validation loss."""
    torch.manual_seed(seed)
    student = make_student("demo", room.cache.manifest.tokenizer.vocab_size, seed)
    steps = len(room.steps)
    config = OptimizerSection(learning_rate=1.5e-3, betas=(0.9, 0.95), warmup_steps=steps // 20, min_factor=0.02)
    optimizer = build_optimizer(student, config)
    for step, (batch, thought) in enumerate(room.steps):
        if look is not None:
            look(step, student)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, steps, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_units()):
            value = loss(student, batch, thought)
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if look is not None:
        look(steps, student)
    return validation(room, student)


@torch.no_grad()
def validation(room: Room, student: PreTrainedModel) -> float:
    student.eval()
    distiller = Distiller(student, resolve(Losses.of({"cross_entropy": {}}), room.cache, student))
    total = labels = 0.0
    for batch in room.held_out:
        sums = distiller(batch, look=batch_sums)
        total += float(sums["segment_loss"].sum())
        labels += float(sums["segment_labels"].sum())
    student.train()
    return total / labels


def gradient(student: PreTrainedModel, loss: Loss, batch: CodedBatch, thought: Tensor) -> Tensor:
    """Of all parameters, in float32 throughout."""
    student.zero_grad(set_to_none=True)
    loss(student, batch, thought).backward()
    found = torch.cat([p.grad.flatten().double() for p in student.parameters() if p.grad is not None])
    student.zero_grad(set_to_none=True)
    return found


def along_the_live_run(room: Room, looks: int) -> list[dict[str, float]]:
    """At `looks` places of the live run at T = 1: angle in degrees and ratio of norms, by temperature, on the step's own rows."""
    places = {round(i * len(room.steps) / (looks - 1)) for i in range(looks)}
    found: list[dict[str, float]] = []

    def look(step: int, student: PreTrainedModel) -> None:
        if step not in places:
            return
        batch, thought = room.steps[min(step, len(room.steps) - 1)]
        row: dict[str, float] = {"step": step}
        for temperature in TEMPERATURES:
            cached, exact = (gradient(student, make(room, temperature), batch, thought) for make in (from_cache, live))
            cosine = F.cosine_similarity(cached, exact, 0).clamp(-1, 1)
            row[f"angle@{temperature:g}"] = float(torch.rad2deg(torch.arccos(cosine)))
            row[f"ratio@{temperature:g}"] = float(cached.norm() / exact.norm())
        found.append(row)

    train(room, 0, live(room, 1.0), look)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0, "values": list(values)}


def ends(room: Room, seeds: int, temperature: float, checkout: Path | None) -> dict[str, Any]:
    """Validation loss at the end by way, and the difference (ii) - (iii) seed by seed."""
    ways: dict[str, Loss] = {"cross-entropy": cross_entropy(room)}
    ways |= {"from the cache": from_cache(room, temperature), "live teacher": live(room, temperature)}
    if checkout is not None:
        ways["DistillKit"] = distillkit(room, temperature, checkout)
    losses: dict[str, list[float]] = {name: [] for name in ways}
    with progress_bar() as progress:
        bar = progress.add_task(f"T = {temperature:g}", total=seeds * len(ways), unit="students")
        for seed in range(seeds):
            for name, loss in ways.items():
                losses[name].append(train(room, seed, loss))
                progress.advance(bar)
    found: dict[str, Any] = {name: spread(values) for name, values in losses.items()}
    pairs = zip(losses["from the cache"], losses["live teacher"], strict=True)
    found["from the cache - live"] = spread([a - b for a, b in pairs])
    gained = found["cross-entropy"]["mean"] - found["live teacher"]["mean"]
    if gained > 0:  # at a temperature that teaches worse than no teacher, there is nothing to share
        found["share of the gain"] = (found["cross-entropy"]["mean"] - found["from the cache"]["mean"]) / gained
    return found


def show(found: dict[str, Any]) -> None:
    table = Table(
        "step", *(f"{what} at T = {t:g}" for t in TEMPERATURES for what in ("angle, °", "norm ratio")), title="cached against live"
    )
    for row in found["gradients"]:
        cells = [f"{row[f'{what}@{t:g}']:.{digits}f}" for t in TEMPERATURES for what, digits in (("angle", 3), ("ratio", 4))]
        table.add_row(str(row["step"]), *cells)
    Console().print(table)
    table = Table("T", "way", "validation loss, nats", "sd", title="the end of training")
    for temperature, ways in found["ends"].items():
        for name, value in ways.items():
            if isinstance(value, dict):
                table.add_row(temperature, name, f"{value['mean']:.4f}", f"{value['sd']:.4f}")
            else:
                table.add_row(temperature, name, f"{value:.1%}", "")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="runs/demo/cache.zarr")
    parser.add_argument("--teacher", default=str(TOOLS / "demo_teacher"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=8, help="at T = 1")
    parser.add_argument("--other-seeds", type=int, default=3, help="at T = 2 and 3; 0 leaves them out")
    parser.add_argument("--looks", type=int, default=6)
    parser.add_argument("--validation-tokens", type=int, default=65_536)
    parser.add_argument("--distillkit", type=Path, help="a checkout of arcee-ai/DistillKit")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    keep_freed_memory()
    cache = open_cache(args.cache)
    room = enter(cache, args.teacher, args.steps, args.rows, args.validation_tokens)
    found: dict[str, Any] = {
        "cache": cache.manifest.cache_id,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    found |= {"steps": args.steps, "tokens_a_step": args.rows * cache.manifest.plan.context}
    found["gradients"] = along_the_live_run(room, args.looks)
    found["ends"] = {"1": ends(room, args.seeds, 1.0, args.distillkit)}
    for temperature in TEMPERATURES[1:] if args.other_seeds else ():
        found["ends"][f"{temperature:g}"] = ends(room, args.other_seeds, temperature, args.distillkit)
    show(found)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "parity.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    guarded(main)
