"""What a training step costs: the same student on the same rows, each way in a process of its own, all of them alive and taking turns
step by step, so that what disturbs one disturbs all.

(a) Hugging Face's own cross-entropy, as it comes and with our setting of the allocator; (b) our chunked cross-entropy; (c) forward KL from the cache, plain and compiled, and the other
divergences, and a mixture; (d) with hidden states and attention too; (e) a live teacher beside it, full-vocabulary KL in plain PyTorch, and
TRL's loss where trl is installed. Seconds of a step (data, forward, backward, clipping, AdamW) and peak memory of the process.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fill import make_teacher, recipe_of
from model_taps.loading import load_model
from run_kit.command_line import guarded, keep_freed_memory
from run_kit.progress import progress_bar
from signal_store.cache import Cache, open_cache
from signal_store.errors import SignalStoreError
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.loader import load
from student_train.data.sections import StreamSection
from student_train.data.stream import Stream
from student_train.losses.objective import resolve
from student_train.losses.section import Losses
from student_train.model.distiller import Distiller
from student_train.train.optimizer import build_optimizer
from student_train.train.sections import OptimizerSection

TOOLS = Path(__file__).parent.parent
STUDENTS: dict[str, dict[str, Any]] = {
    "demo": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
    "large": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3},
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "b: chunked cross-entropy": {"cross_entropy": {}},
    "c: forward KL": {"forward_kl": {"temperature": 1.0}},
    "c: forward KL at 2": {"forward_kl": {"temperature": 2.0}},
    "c: forward KL, compiled": {"forward_kl": {"temperature": 1.0}},
    "reverse KL": {"reverse_kl": {}},
    "Jensen-Shannon": {"jsd": {}},
    "total variation": {"total_variation": {}},
    "mixture: cross-entropy + forward KL": {"cross_entropy": {}, "forward_kl": {"temperature": 1.0}},
    "mixture: forward KL at 1 + JSD at 2": {"forward_kl": {"temperature": 1.0}, "jsd": {"temperature": 2.0}},
    "d: with hidden and attention": {"forward_kl": {"temperature": 1.0}, "lhsm": {}, "apc": {"weight": 0.5}},
}
OTHERS = (
    "a: Hugging Face cross-entropy",
    "a: the same, our allocator setting",
    "e: live teacher, plain KL",
    "e: live teacher, TRL's loss",
)
WARM_UP = 2


def make_student(kind: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    common = {"vocab_size": vocab_size, "head_dim": 64, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **common, **STUDENTS[kind]))
    model.train()
    return model


def hugging_face_labels(batch: CodedBatch) -> Tensor:
    """Labels as transformers takes them: it shifts by one itself, so a segment's first token is masked."""
    return batch.input_ids.masked_fill(~batch.real | (batch.position_ids == 0), -100)


def live_step(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[CodedBatch], Tensor]:
    def step(batch: CodedBatch) -> Tensor:
        options: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        with torch.no_grad():
            expected = teacher(**options).logits
        return loss(student(**options).logits.flatten(0, 1)[batch.flat], expected.flatten(0, 1)[batch.flat])

    return step


def plain_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    log_q, log_p = student_NV.float().log_softmax(-1), teacher_NV[:, : student_NV.shape[1]].float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def trl_loss(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    found: Tensor = GKDTrainer.generalized_jsd_loss(student_NV[None], teacher_NV[None, :, : student_NV.shape[1]], beta=0.0)
    return found


def step_of(
    way: str, cache: Cache, teacher: str, student: PreTrainedModel
) -> tuple[Callable[[CodedBatch], Tensor], torch.nn.Module, Any]:
    """(forward to the loss, what is trained, what it needs of the cache)."""
    if way in OURS:
        objective = resolve(Losses.of(OURS[way]), cache, student)
        distiller = Distiller(student, objective, impl="compiled" if way.endswith("compiled") else "torch")
        distiller.codecs = Codecs.of(cache, objective.needs, torch.device("cpu"))

        def ours(batch: CodedBatch) -> Tensor:
            if objective.matched_layers and not distiller.head_pairs:
                assert distiller.choose_heads(batch)
            counts = objective.counts(batch)
            weights = {name: weight / max(1, counts[name]) for name, weight in objective.weights(1.0).items()}
            total: Tensor = distiller(batch, weights)[0]
            return total

        return ours, distiller, objective.needs
    needs = resolve(Losses.of({"cross_entropy": {}}), cache, student).needs
    if way.startswith("a:"):

        def hugging_face(batch: CodedBatch) -> Tensor:
            found = student(
                input_ids=batch.input_ids, position_ids=batch.position_ids, labels=hugging_face_labels(batch), use_cache=False
            )
            total: Tensor = found.loss
            return total

        return hugging_face, student, needs
    live = load_model(teacher, what="teacher", dtype=torch.bfloat16)
    return live_step(student, live, trl_loss if "TRL" in way else plain_kl), student, needs


def serve(way: str, cache: Cache, teacher: str, kind: str, rows: int) -> None:
    """Make one step for each line that comes; answer with its seconds and how long it waited for data; at the end, the peak memory."""
    if way != OTHERS[0]:
        keep_freed_memory()
    student = make_student(kind, cache.manifest.tokenizer.vocab_size)
    forward, module, needs = step_of(way, cache, teacher, student)
    optimizer = build_optimizer(module, OptimizerSection(learning_rate=1e-4))
    config = StreamSection(sequence_length=cache.manifest.plan.context, global_batch_rows=rows, workers=1)
    packed_batches = load(Stream(cache, needs, config, packed=True), {}, 0, pin_memory=False)
    for _line in sys.stdin:
        started = time.perf_counter()
        batch = next(packed_batches).batch
        waited = time.perf_counter() - started
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(batch)
        loss.backward()
        if isinstance(module, Distiller):
            module.close_taps()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sys.stdout.write(json.dumps({"seconds": seconds, "wait": waited, "peak_bytes": peak}) + "\n")
        sys.stdout.flush()


def pair(kind: str, cache: str, teacher: str, args: argparse.Namespace) -> dict[str, Any]:
    """All ways, `steps` turns of one step each; medians over turns of seconds, and of the ratios to (b) and to (a) of the same turn."""
    every = [*OTHERS[:2], *OURS, OTHERS[2], *(OTHERS[3:] if args.trl else ())]
    ways = [way for way in every if kind == "demo" or (way[:2] in ("a:", "b:", "c:", "d:", "e:") and way != "c: forward KL at 2")]
    processes: dict[str, subprocess.Popen[str]] = {}
    for way in ways:
        command = [sys.executable, __file__, "--serve", way, "--kind", kind, "--cache", cache, "--teacher", teacher]
        command += ["--rows", str(args.rows)]
        processes[way] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        step(processes[way])  # one after the other: they would fight while they load
    turns: list[dict[str, dict[str, float]]] = []
    with progress_bar() as progress:
        bar = progress.add_task(kind, total=WARM_UP + args.steps, unit="turns")
        for _ in range(WARM_UP + args.steps):
            turns.append({way: step(process) for way, process in processes.items()})
            progress.advance(bar)
    for process in processes.values():
        process.communicate()
    counted = turns[WARM_UP:]
    summary = {}
    for way in ways:
        b, a = "b: chunked cross-entropy", OTHERS[0]
        summary[way] = {
            "seconds": statistics.median(t[way]["seconds"] for t in counted),
            "to_b": statistics.median(t[way]["seconds"] / t[b]["seconds"] for t in counted),
            "to_a": statistics.median(t[way]["seconds"] / t[a]["seconds"] for t in counted),
            "peak_bytes": turns[-1][way]["peak_bytes"],
            "wait": statistics.median(t[way]["wait"] / t[way]["seconds"] for t in counted),
        }
    context = open_cache(cache).manifest.plan.context
    return {"tokens": args.rows * context, "turns": len(counted), "ways": summary}


def step(process: subprocess.Popen[str]) -> dict[str, float]:
    """One step of a way."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SignalStoreError("a way ended", found=f"exit code {process.wait()}", where=" ".join(map(str, process.args)))  # type: ignore[arg-type]
    found: dict[str, float] = json.loads(answer)
    return found


def show(kind: str, found: dict[str, Any]) -> None:
    table = Table(title=f"{kind} pair, {found['tokens']:,.0f} tokens a step")
    for column in ("way", "s a step", "× b", "× a", "peak, MiB", "data wait"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, row in found["ways"].items():
        cells = (
            f"{row['seconds']:.3f}",
            f"{row['to_b']:.2f}",
            f"{row['to_a']:.2f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['wait']:.1%}",
        )
        table.add_row(way, *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="runs/demo/cache.zarr", help="the demo pair's")
    parser.add_argument("--teacher", default=str(TOOLS / "demo_teacher"))
    parser.add_argument("--pairs", nargs="+", default=["demo", "large"], choices=list(STUDENTS))
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, each as long as the cache's context")
    parser.add_argument("--steps", type=int, default=12, help="turns")
    parser.add_argument("--trl", action="store_true", help="TRL's loss too; trl must be installed")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="demo", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, open_cache(args.cache), args.teacher, args.kind, args.rows)
        return
    found: dict[str, Any] = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    with tempfile.TemporaryDirectory() as name:
        for kind in args.pairs:
            cache, teacher = args.cache, args.teacher
            if kind == "large":
                from teacher_cache.commands.build import build

                folder = Path(name)
                parameters = make_teacher(folder / "teacher", 32_768, 768, 9)
                recipe = recipe_of(folder, "large", 200_000, 16_384)
                build(recipe.model_copy(update={"context": 512}))
                cache, teacher = recipe.cache, str(folder / "teacher")
                found["large_teacher_parameters"] = parameters
            found[kind] = pair(kind, cache, teacher, args)
            show(kind, found[kind])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    guarded(main)
