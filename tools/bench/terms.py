"""What each term of the objective adds to a training step: forward KL at T = 1 alone, with each term, with all of `full_000`, and with
all but one kind.

All ways live in one process and take turns step by step, so that what disturbs one disturbs all. Seconds of a step (forward, backward,
clipping, AdamW) on batches that lie ready; medians over turns of the ratios to the mean of two steps of forward KL alone in the same turn. Needs the cache of
`tools/full_cache.py`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from run_kit.command_line import guarded, keep_freed_memory
from run_kit.progress import progress_bar
from signal_store.cache import Cache, open_cache
from step import make_student
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.sections import StreamSection
from student_train.data.stream import Stream
from student_train.losses import registry
from student_train.losses.kinds import Kind
from student_train.losses.objective import Objective, resolve
from student_train.losses.presets import PRESETS
from student_train.model.distiller import Distiller
from student_train.recipe import RunRecipe
from student_train.train.optimizer import build_optimizer
from student_train.train.sections import OptimizerSection

BASE, AGAIN = "forward_kl", "forward_kl, again"
WARM_UP = 2


def recipe_of(**parts: Any) -> RunRecipe:
    return RunRecipe.model_validate({"cache": "none", "out": "none", "student": {"config": {}}, "steps": 1, **parts})


def recipes() -> dict[str, RunRecipe]:
    """Of each way, whose objective it is."""
    forward_kl = {"forward_kl": {"temperature": 1.0}}
    found = {BASE: recipe_of(losses=forward_kl)}
    found |= {
        f"+ {name}": recipe_of(losses={**forward_kl, name: {}}) for name in ("importance", *registry.state_terms(), "cross_entropy")
    }
    levels = {name: PRESETS["every_kind"].losses[name] for name in ("smoothness", "attention_evolution", "replay")}
    found[AGAIN] = recipe_of(losses=forward_kl)
    found["+ the three levels"] = recipe_of(losses={**forward_kl, **levels})
    found["+ the three levels, gated"] = recipe_of(losses={**forward_kl, **levels, "gate": {}})
    found["logits_hidden_attention"] = recipe_of(preset="logits_hidden_attention")
    found["every_kind"] = recipe_of(preset="every_kind")
    return found | {f"every_kind without {kind}": recipe_of(preset="every_kind", without=[kind]) for kind in Kind}


class Way:
    """A student with its objective, one step at a time."""

    def __init__(self, recipe: RunRecipe, cache: Cache, rows: int) -> None:
        student = make_student("demo", cache.manifest.tokenizer.vocab_size)
        self.objective: Objective = resolve(recipe.objective, cache, student)
        self.distiller = Distiller(student, self.objective)
        self.distiller.codecs = Codecs.of(cache, self.objective.needs, torch.device("cpu"))
        self.optimizer = build_optimizer(self.distiller, OptimizerSection(learning_rate=1e-4))
        section = StreamSection(sequence_length=cache.manifest.plan.context, global_batch_rows=rows, workers=0)
        stream = Stream(cache, self.objective.needs, section, packed=True, token_weights=self.objective.token_weights)
        self.batches: Iterator[CodedBatch] = stream.micro_batches({}, 0)

    def step(self) -> float:
        """Seconds of one."""
        batch = next(self.batches)
        if self.objective.matched_layers and not self.distiller.head_pairs:
            assert self.distiller.choose_heads(batch)
        started = time.perf_counter()
        counts, weights = self.objective.counts(batch), self.objective.weights(0.5)
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = self.distiller(batch, {name: weights[name] / max(1, count) for name, count in counts.items()}, 0.5)
        total.backward()
        self.distiller.close_taps()
        torch.nn.utils.clip_grad_norm_(self.distiller.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="runs/full/cache.zarr")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step, each as long as the cache's context")
    parser.add_argument("--steps", type=int, default=15, help="turns")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    keep_freed_memory()
    cache = open_cache(args.cache)
    ways = {name: Way(recipe, cache, args.rows) for name, recipe in recipes().items()}
    turns: list[dict[str, float]] = []
    with progress_bar() as progress:
        bar = progress.add_task("terms", total=WARM_UP + args.steps, unit="turns")
        for _ in range(WARM_UP + args.steps):
            turns.append({name: way.step() for name, way in ways.items()})
            progress.advance(bar)
    counted = turns[WARM_UP:]
    tokens = args.rows * cache.manifest.plan.context
    table = Table("way", "s a step", f"× {BASE}", title=f"demo pair, {tokens:,} tokens a step")
    found: dict[str, Any] = {}
    for name in ways:
        seconds = statistics.median(turn[name] for turn in counted)
        ratio = statistics.median(2 * turn[name] / (turn[BASE] + turn[AGAIN]) for turn in counted)
        found[name] = {"seconds": seconds, "ratio": ratio}
        table.add_row(name, f"{seconds:.3f}", f"{ratio:.2f}")
    Console().print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "tokens": tokens, "turns": len(counted), "ways": found}
    (args.out / "terms.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    guarded(main)
