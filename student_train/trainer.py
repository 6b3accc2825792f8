"""The training loop. Its whole state is the checkpoint's: parameters, optimizer, and a `Progress`."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from accelerate import Accelerator
from torch import nn

from model_taps.head import final_hidden, output_head
from model_taps.packing import probe
from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError, SignalStoreError
from signal_store.progress import progress_bar
from student_train import checkpoint
from student_train.batch import CodedBatch, Cursor
from student_train.checkpoint import Progress
from student_train.distiller import Codecs, Distiller
from student_train.losses.chunked import OutputTargets, OutputTerm, output_loss
from student_train.losses.objective import Objective
from student_train.metrics import MetricsLog
from student_train.recipe import OptimizerSection, RunRecipe
from student_train.stream.loader import load
from student_train.stream.order import key_of
from student_train.stream.rows import Stream

HEAD_MATCHING_BATCHES = 64


def learning_rate_factor(step: int, steps: int, config: OptimizerSection) -> float:
    """Linear warm-up, then cosine to `min_factor`; `step` counts finished optimizer steps."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_factor + (1 - config.min_factor) * 0.5 * (1 + math.cos(math.pi * share))


def build_optimizer(module: nn.Module, config: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, projections included; vectors do not decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


@dataclass(slots=True)
class Trainer:
    """One run in progress."""

    recipe: RunRecipe
    cache: Cache
    objective: Objective
    distiller: Distiller
    recipe_digest: str

    def train(self) -> Progress:
        """Train to the end, from the last checkpoint if there is one. Returns the last progress."""
        recipe = self.recipe
        accelerator = Accelerator(mixed_precision="bf16" if recipe.precision == "bfloat16" else "no")
        if accelerator.num_processes > 1:
            raise InputError("several processes train one student", expected="one process", found=accelerator.num_processes)
        device = accelerator.device
        stream = Stream(
            self.cache,
            self.objective.needs,
            recipe.stream,
            packed=probe(self.distiller.student, self.cache.manifest.tokenizer.vocab_size) == "packed",
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        optimizer = build_optimizer(self.distiller, recipe.optimizer)
        progress = self._resume(optimizer)
        self.distiller.codecs = Codecs.of(self.cache, self.objective, device)
        model, prepared = accelerator.prepare(self.distiller, optimizer)
        if self.objective.attention_pairs and not progress.head_pairs:
            progress = replace(progress, head_pairs=self._match_heads(stream, device))
        self.distiller.head_pairs = progress.head_pairs
        log = MetricsLog(recipe.out / "metrics.jsonl", progress.step)
        batches = load(stream, progress.cursor, pin_memory=device.type == "cuda")
        with progress_bar() as display:
            bar = display.add_task("train", total=recipe.steps, completed=progress.step, unit="steps")
            while progress.step < recipe.steps and not self._patience_is_over(progress):
                started = time.perf_counter()
                micro = list(islice(batches, stream.micro_steps))
                waited = time.perf_counter() - started
                record = self._step(accelerator, model, prepared, micro, progress.step)
                seconds = time.perf_counter() - started
                progress = replace(
                    progress,
                    step=progress.step + 1,
                    cursor=micro[-1].cursor,
                    tokens=progress.tokens + int(record["tokens"]),
                    train_seconds=progress.train_seconds + seconds,
                )
                log.write(step=progress.step, **record, seconds=seconds, data_wait_seconds=waited)
                display.update(bar, advance=1, description=f"train  loss {record['loss']:.4f}")
                if recipe.validation is not None and (
                    progress.step % recipe.validation.every == 0 or progress.step == recipe.steps
                ):
                    progress = self._validate(accelerator, stream, progress, log)
                if progress.step % recipe.checkpoint.every == 0 or progress.step == recipe.steps:
                    checkpoint.save(recipe.out / "checkpoints", self.distiller, optimizer, progress, recipe.checkpoint.keep)
        log.close()
        return progress

    def _resume(self, optimizer: torch.optim.Optimizer) -> Progress:
        found = checkpoint.checkpoints(self.recipe.out / "checkpoints")
        if not found:
            return Progress(self.cache.manifest.cache_id, self.recipe_digest, 0, Cursor(), None, None, 0, {}, 0, 0.0)
        progress = checkpoint.restore(found[-1], self.distiller, optimizer)
        expected = {"cache_id": self.cache.manifest.cache_id, "recipe_digest": self.recipe_digest}
        for name, value in expected.items():
            if getattr(progress, name) != value:
                raise MismatchError(
                    f"the checkpoint has another {name}", expected=value, found=getattr(progress, name), where=found[-1]
                )
        return progress

    def _match_heads(self, stream: Stream, device: torch.device) -> dict[int, list[tuple[int, int]]]:
        """On the stream's first rows, the same for every rank."""
        first = replace(stream, rank=0, world_size=1)
        self.distiller.student.eval()
        matched = any(
            self.distiller.choose_heads(b.to(device)) for b in islice(first.micro_batches(Cursor()), HEAD_MATCHING_BATCHES)
        )
        self.distiller.student.train()
        if not matched:
            raise MismatchError(
                "apc: no keyword row in the first batches", expected="some, to match heads by", where=self.cache.uri
            )
        return self.distiller.head_pairs

    def _step(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, micro: list[CodedBatch], step: int
    ) -> dict[str, float]:
        """One optimizer step; every loss is a mean over the global batch: counts are summed over ranks before any backward."""
        recipe, ranks = self.recipe, accelerator.num_processes
        torch.manual_seed(key_of(recipe.seed, step, accelerator.process_index) % 2**63)
        factor = learning_rate_factor(step, recipe.steps, recipe.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.learning_rate * factor
        terms = list(self.objective.terms)
        local = [[batch.counts[name] for name in terms] + [int(batch.real.sum())] for batch in micro]
        counts = torch.tensor(local, dtype=torch.float64, device=accelerator.device).sum(0)
        counts = accelerator.reduce(counts, reduction="sum")
        weights = self.objective.weights(step / recipe.steps)
        count_of = dict(zip(terms, counts.tolist(), strict=False))
        scales = {name: weights[name] * ranks / max(1.0, count_of[name]) for name in terms}
        sums = torch.zeros(len(terms), dtype=torch.float64, device=accelerator.device)
        for number, batch in enumerate(micro):
            unsynchronised = accelerator.no_sync(model) if number < len(micro) - 1 else contextlib.nullcontext()
            with unsynchronised, accelerator.autocast():
                losses = model(batch.to(accelerator.device), scales)
                accelerator.backward(losses.total)
            sums += torch.stack([losses.sums[name].double() if name in losses.sums else sums.new_zeros(()) for name in terms])
        sums = accelerator.reduce(sums, reduction="sum")
        norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm or math.inf)
        found = {name: float(value) for name, value in zip(terms, sums.tolist(), strict=True) if name in losses.sums}
        means = {name: value / max(1.0, count_of[name]) for name, value in found.items()}
        loss = sum(weights[name] * mean for name, mean in means.items())
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            segments = sorted({segment for batch in micro for segment in batch.segments})
            raise SignalStoreError(
                "the loss is not finite",
                found=f"loss {loss}, gradient norm {float(norm)}",
                where=f"step {step}, segments {segments[:20]}",
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lr = recipe.optimizer.learning_rate * factor
        by_column = (("loss", means), ("weight", weights), ("count", count_of))
        parts = {f"{name}_{what}": by[name] for name in terms for what, by in by_column if name in by}
        return {"loss": loss, "learning_rate": lr, "gradient_norm": float(norm), "tokens": float(counts[-1]), **parts}

    def _validate(self, accelerator: Accelerator, stream: Stream, progress: Progress, log: MetricsLog) -> Progress:
        config = self.recipe.validation
        assert config is not None
        loss, tokens = validation_loss(accelerator, self.distiller, stream.once("validation", config.max_tokens))
        log.write(step=progress.step, validation_loss=loss, validation_tokens=tokens)
        better = progress.best_loss is None or loss < progress.best_loss - config.min_gain
        if not better:
            return replace(progress, validations_without_gain=progress.validations_without_gain + 1)
        if self.recipe.export == "best" and accelerator.is_main_process:
            checkpoint.save_best(self.recipe.out / "best", self.distiller, progress.step)
        return replace(progress, best_loss=loss, best_step=progress.step, validations_without_gain=0)

    def _patience_is_over(self, progress: Progress) -> bool:
        config = self.recipe.validation
        return config is not None and config.patience is not None and progress.validations_without_gain >= config.patience


@torch.no_grad()
def validation_loss(accelerator: Accelerator, distiller: Distiller, batches: Iterator[CodedBatch]) -> tuple[float, int]:
    """(mean -log q(label) in nats, number of labels) over batches of all ranks."""
    student = distiller.student
    student.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for coded in batches:
        batch = coded.to(accelerator.device)
        with accelerator.autocast():
            hidden = final_hidden(student, batch.input_ids, batch.position_ids if batch.packed else None)
            targets, term = OutputTargets(batch.labels), OutputTerm("cross_entropy", 1.0)
            loss, _ = output_loss(hidden.flatten(0, 1)[batch.flat], output_head(student), targets, [term])
        sums += torch.stack([loss.double(), (batch.labels >= 0).sum().double()])
    student.train()
    loss_sum, count = accelerator.reduce(sums, reduction="sum").tolist()
    if not count:
        raise MismatchError("the cache has no validation split", expected="a source with split: validation", found="none")
    return loss_sum / count, int(count)
