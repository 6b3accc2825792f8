"""The training loop. Its whole state is the checkpoint's: parameters, optimizer, and a `Progress`."""

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from model_taps.attention_interface import own_kernel
from model_taps.causality import refuse_look_ahead
from model_taps.head import refuse_another_head
from run_kit.progress import progress_bar
from signal_store.cache import Cache
from signal_store.errors import MismatchError, SignalStoreError
from student_train.data.codecs import Codecs
from student_train.data.loader import load
from student_train.data.order import key_of
from student_train.data.packed_batch import Parcel
from student_train.data.rows import Cursor, Stream
from student_train.evaluate.validation import validate, validation_needs
from student_train.importance.overhead import Overhead
from student_train.losses.objective import Objective
from student_train.losses.parameter_anchor import Anchor
from student_train.losses.router_balance import refuse_lost_losses
from student_train.recipe import OptimizerSection, RunRecipe
from student_train.student.build import build_student, cached_tokenizer, packs_rows
from student_train.train import checkpoint
from student_train.train.checkpoint import Progress
from student_train.train.distiller import GATE_WEIGHTS, Distiller
from student_train.train.metrics import RunLog
from student_train.train.parallel import Shared, like

HEAD_MATCHING_BATCHES = 64
HEAD_MATCHING_ROWS = 4


def learning_rate_factor(step: int, steps: int, config: OptimizerSection) -> float:
    """Linear warm-up, then cosine to `min_factor`; `step` counts finished optimizer steps."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_factor + (1 - config.min_factor) * 0.5 * (1 + math.cos(math.pi * share))


def build_optimizer(module: nn.Module, config: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, the terms' own included; vectors do not decay."""
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
    accelerator: Accelerator
    cache: Cache
    objective: Objective
    distiller: Distiller
    recipe_digest: str
    begin: Callable[[int, bool], None]
    """Called with the step and whether rows are packed, where nothing of the recipe is wrong: the run's record is written then."""
    packed: bool | None = None
    """How the run's rows were cut when it began; None if it begins now."""

    def train(self) -> Progress:
        """Train to the end, from the last checkpoint if there is one. Returns the last progress, which is a checkpoint's."""
        recipe, accelerator = self.recipe, self.accelerator
        device = accelerator.device
        self.distiller.to(device)
        student, vocab_size = self.distiller.student, self.cache.manifest.tokenizer.vocab_size
        with self._probing():
            refuse_look_ahead(student, vocab_size, "student")
            refuse_another_head(student, vocab_size, "student")
            self.distiller.refuse_silent_rows()
            refuse_lost_losses(student, vocab_size, self.objective.balance)
            packed = self._cut(packs_rows(student, self.cache, recipe.stream))
        ranks = accelerator.process_index, accelerator.num_processes
        stream = Stream(self.cache, self.objective.needs, recipe.stream, packed, *ranks, self.objective.weigher)
        found = checkpoint.newest(recipe.out / "checkpoints")
        progress = self._begin() if found is None else self._accepted(checkpoint.restore_module(found, self.distiller), found)
        if recipe.activation_checkpointing:
            enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        anchored = self.objective.losses.parameter_anchor is not None
        start = self._start() if anchored else {}
        shared = Shared.of(accelerator, self.distiller, recipe.sharing)
        anchor = Anchor.of(self.distiller.student, start, like) if anchored else None
        del start
        optimizer = build_optimizer(self.distiller, recipe.optimizer)
        if found is not None:
            checkpoint.restore_optimizer(found, optimizer)
        held_out = validation_needs(self.cache, with_teacher=recipe.validation is not None and recipe.validation.fidelity)
        self.distiller.codecs = Codecs.of(self.cache, self.objective.needs.union(held_out), device, recipe.tail_rank)
        if self.objective.matched_layers and not progress.head_pairs:
            progress = replace(progress, head_pairs=self._match_heads(shared, stream))
        self.distiller.head_pairs = progress.head_pairs
        self.begin(progress.step, packed)
        batches = load(stream, progress.cursor, progress.step - progress.stream_start, pin_memory=device.type == "cuda")
        open_log = closing(RunLog(recipe.out, progress.step, accelerator, tensorboard=recipe.tensorboard))
        overhead = Overhead(self.objective.losses.importance, speaks=accelerator.is_main_process)
        with open_log as log, progress_bar() as display:
            bar = display.add_task("train", total=recipe.steps, completed=progress.step, unit="steps")
            while progress.step < recipe.steps and not self._patience_is_over(progress):
                started = time.perf_counter()
                micro = list(islice(batches, stream.micro_steps))
                waited = time.perf_counter() - started
                shares = self._gradient_shares(shared, optimizer, micro[0], progress.step) if self._looks(progress.step) else {}
                started = time.perf_counter() - waited
                record = self._step(shared, optimizer, micro, progress.step, anchor) | shares
                record |= overhead.seen(waited, record["forward_seconds"])
                seconds = time.perf_counter() - started
                tokens = int(record["tokens"])
                progress = replace(
                    progress,
                    step=progress.step + 1,
                    cursor=_later(progress.cursor, *(parcel.contents.cursor for parcel in micro)),
                    tokens=progress.tokens + tokens,
                    train_seconds=progress.train_seconds + seconds,
                )
                log.write(step=progress.step, **record, seconds=seconds, data_wait_seconds=waited)
                says = f"loss {record['loss']:.3f} {tokens / seconds:,.0f} tok/s wait {waited / seconds:.0%}"
                display.update(bar, advance=1, description=says)
                last = progress.step == recipe.steps
                if recipe.validation is not None and (last or progress.step % recipe.validation.every == 0):
                    progress = self._validate(shared, stream, progress, log)
                if last or progress.step % recipe.checkpoint.every == 0 or self._patience_is_over(progress):
                    progress = self._save(shared, optimizer, progress)
        return progress

    def _probing(self) -> contextlib.AbstractContextManager[None]:
        """Probes run in float32, where rounding is far below what they look for; FlashAttention has none."""
        flash = "flash" in own_kernel(self.distiller.student)
        return self.accelerator.autocast() if flash else contextlib.nullcontext()

    def _cut(self, able: bool) -> bool:
        """Whether rows hold several segments: as they did when the run began. MismatchError where this student cannot."""
        if self.packed and not able:
            raise MismatchError(
                "the run's rows hold several segments, which this student does not keep apart here",
                expected="the attention that the run began with",
                found=own_kernel(self.distiller.student),
                where="student.attn_implementation",
            )
        return able if self.packed is None else self.packed

    def _begin(self) -> Progress:
        return Progress(self.cache.manifest.cache_id, self.recipe_digest, 0, {}, None, None, 0, {}, 0, 0.0)

    def _accepted(self, progress: Progress, where: object) -> Progress:
        """The checkpoint's progress; MismatchError where it is another cache's or recipe's."""
        cache_id = self.cache.manifest.cache_id
        for name, value in (("cache_id", cache_id), ("recipe_digest", self.recipe_digest)):
            if getattr(progress, name) != value and not self.recipe.checkpoint.accept_other_cache:
                raise MismatchError(
                    f"the checkpoint has another {name}",
                    expected=value,
                    found=getattr(progress, name),
                    where=where,
                    remedy="Give another out; or checkpoint.accept_other_cache, to go on with this cache from its beginning.",
                )
        if (progress.cache_id, progress.recipe_digest) == (cache_id, self.recipe_digest):
            return progress
        # Another cache's or recipe's places, heads and best loss mean nothing here.
        if self.objective.gate is not None:
            self.objective.gate.forget()
        fresh = replace(self._begin(), step=progress.step, stream_start=progress.step)
        return replace(fresh, tokens=progress.tokens, train_seconds=progress.train_seconds)

    def _save(self, shared: Shared, optimizer: torch.optim.Optimizer, progress: Progress) -> Progress:
        """A checkpoint, with the places of all ranks' lanes."""
        cursors: list[Cursor] = gather_object([progress.cursor])
        progress = replace(progress, cursor=_later(*cursors))
        folder, keep, writes = self.recipe.out / "checkpoints", self.recipe.checkpoint.keep, self.accelerator.is_main_process
        checkpoint.save(folder, shared.distiller, optimizer, progress, keep, writes=writes)
        self.accelerator.wait_for_everyone()
        return progress

    def _match_heads(self, shared: Shared, stream: Stream) -> dict[int, list[tuple[int, int]]]:
        """On the stream's first rows, the same for every rank and whatever a micro-batch holds."""
        config = stream.config.model_copy(update={"micro_rows": math.gcd(HEAD_MATCHING_ROWS, stream.config.rows_per_step)})
        first = replace(stream, config=config, rank=0, world_size=1)
        shared.distiller.student.eval()
        matched = any(
            shared.model(batch.to(shared.accelerator.device), matching=True)
            for batch in islice(first.micro_batches({}, 0), HEAD_MATCHING_BATCHES)
        )
        shared.reshard()
        shared.distiller.student.train()
        if not matched:
            raise MismatchError("no keyword row in the first batches", expected="some, to match heads by", where=self.cache.uri)
        return shared.distiller.head_pairs

    def _step(
        self, shared: Shared, optimizer: torch.optim.Optimizer, micro: list[Parcel], step: int, anchor: Anchor | None
    ) -> dict[str, float]:
        """One optimizer step; every loss is a mean over the global batch: counts are summed over ranks before any backward."""
        recipe, accelerator = self.recipe, self.accelerator
        torch.manual_seed(key_of(recipe.seed, step, accelerator.process_index) % 2**63)
        factor = learning_rate_factor(step, recipe.steps, recipe.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.learning_rate * factor
        terms = list(self.objective.terms)
        batches = [parcel.batch for parcel in micro]
        local = [[*self.objective.counts(batch).values(), int(batch.real.sum()), batch.real.numel()] for batch in batches]
        counts = torch.tensor(local, dtype=torch.float64, device=accelerator.device).sum(0)
        *of_terms, tokens, room = accelerator.reduce(counts, reduction="sum").tolist()
        weights = self.objective.weights(step / recipe.steps)
        count_of = dict(zip(terms, of_terms, strict=True))
        scales = {name: weights[name] * accelerator.num_processes / max(1.0, count_of[name]) for name in terms}
        sums = torch.zeros(len(terms), dtype=torch.float64, device=accelerator.device)
        gate, gate_weights = self.objective.gate, torch.zeros((), device=accelerator.device)
        forward_seconds = 0.0
        for number, parcel in enumerate(micro):
            with shared.micro_step(last=number == len(micro) - 1):
                started = self._now()
                with accelerator.autocast():
                    total, found = shared.model(parcel.to(accelerator.device), scales, step / recipe.steps)
                forward_seconds += self._now() - started
                total.backward()
            sums += torch.stack([found[name].double() if name in found else sums.new_zeros(()) for name in terms])
            gate_weights = gate_weights + found.get(GATE_WEIGHTS, 0)
        values = dict(zip(terms, accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
        pulled = {} if anchor is None else {"parameter_anchor": anchor.pull(weights["parameter_anchor"])}
        norm = shared.clipped_norm(recipe.optimizer.clip_norm or math.inf)
        means = {name: values[name] / max(1.0, count_of[name]) for name in terms if name in found} | pulled
        loss = sum(weights[name] * mean for name, mean in means.items() if name != "gate")  # which is not the student's
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._not_finite(loss, norm, step, micro)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        by_column = (("loss", means), ("weight", weights), ("count", count_of))
        parts = {f"{name}_{what}": by[name] for name in terms for what, by in by_column if name in by}
        rate = recipe.optimizer.learning_rate * factor
        parts |= {f"parameter_anchor_{what}": by["parameter_anchor"] for what, by in by_column[:2] if "parameter_anchor" in by}
        parts["forward_seconds"] = forward_seconds
        if gate is not None:
            gate.observe({name: means[name] for name in gate.levels if count_of[name]})
            parts |= gate.described(accelerator.reduce(gate_weights, reduction="sum"))
        return {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens": tokens, "row_fill": tokens / room, **parts}

    def _now(self) -> float:
        """Seconds; where a forward pass is measured for importance weights, after a GPU has done what it was told."""
        if self.objective.weigher is not None and self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _looks(self, step: int) -> bool:
        every = self.recipe.gradient_shares_every
        return every is not None and step % every == 0

    def _gradient_shares(self, shared: Shared, optimizer: torch.optim.Optimizer, parcel: Parcel, step: int) -> dict[str, float]:
        """Each term's share of the sum of the terms' gradient norms, on one micro-batch, each term by itself (REQUIREMENTS 76)."""
        accelerator = shared.accelerator
        counts, weights = self.objective.counts(parcel.batch), self.objective.weights(step / self.recipe.steps)
        norms = {}
        for name in self.objective.terms:
            scales = {other: weights[name] / max(1.0, counts[name]) if other == name else 0.0 for other in self.objective.terms}
            with shared.micro_step(last=True):
                with accelerator.autocast():
                    total, _ = shared.model(parcel.to(accelerator.device), scales, step / self.recipe.steps)
                total.backward()
            norms[name] = shared.clipped_norm(math.inf)
            optimizer.zero_grad(set_to_none=True)
        return {f"{name}_gradient_share": norm / max(sum(norms.values()), 1e-30) for name, norm in norms.items()}

    def _start(self) -> dict[str, torch.Tensor]:
        """The student's weights as the run began with them; on a resumed run they are made again as they were made then."""
        fresh, _ = build_student(self.recipe.student, self.cache)
        return {name: p.detach() for name, p in fresh.named_parameters() if p.requires_grad}

    def _not_finite(self, loss: float, norm: float, step: int, micro: list[Parcel]) -> SignalStoreError:
        """With the segments of the step and how their texts begin, escapes shown (REQUIREMENTS 92)."""
        tokenizer = cached_tokenizer(self.cache)
        segments = sorted({segment for parcel in micro for segment in parcel.contents.segments})
        texts = [f"{n}: {tokenizer.decode(self.cache[n].input_ids[:24].tolist())!a}" for n in segments[:4]]
        return SignalStoreError(
            "the loss is not finite",
            found=f"loss {loss}, gradient norm {norm}",
            where=f"step {step}, segments {segments[:20]}, which begin {'; '.join(texts)}",
            remedy="Lower the learning rate, in an out of its own, or look at these texts.",
        )

    def _validate(self, shared: Shared, stream: Stream, progress: Progress, log: RunLog) -> Progress:
        config = self.recipe.validation
        assert config is not None
        needs = validation_needs(self.cache, with_teacher=config.fidelity)
        found = validate(shared, stream, needs, config.max_tokens)
        log.write(step=progress.step, **found)
        loss = found["validation_loss"]
        better = progress.best_loss is None or loss < progress.best_loss - config.min_gain
        if not better:
            return replace(progress, validations_without_gain=progress.validations_without_gain + 1)
        if self.recipe.export == "best":
            checkpoint.save_best(self.recipe.out / "best", shared.distiller, progress.step, writes=self.accelerator.is_main_process)
        return replace(progress, best_loss=loss, best_step=progress.step, validations_without_gain=0)

    def _patience_is_over(self, progress: Progress) -> bool:
        config = self.recipe.validation
        return config is not None and config.patience is not None and progress.validations_without_gain >= config.patience


def _later(*cursors: Cursor) -> Cursor:
    """By lane, the place that is farthest on."""
    found: Cursor = {}
    for cursor in cursors:
        for lane, at in cursor.items():
            if lane not in found or at.rows > found[lane].rows:
                found[lane] = at
    return dict(sorted(found.items()))
