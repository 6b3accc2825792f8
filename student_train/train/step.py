"""One optimizer step: every loss is a mean over the global batch, for counts are summed over ranks before any backward pass.

Where the host waits for the device: once for the counts, where there are several ranks (they are needed to scale the losses); once
for all sums, extras and the norm together (the update is not made where they are not finite); and once for the parameter anchor's
value, where it is on. Terms may wait in their forward passes, and a gate when the engine tells it of its levels' losses. Everything
else is only told to the device.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from signal_store.errors import SignalStoreError
from student_train.align.tokenizers import cached_tokenizer
from student_train.data.order import key_of
from student_train.data.packed_batch import PackedBatch
from student_train.engine.controller import Measured
from student_train.train.optimizer import learning_rate_factor, set_learning_rate
from student_train.train.start import Run

SHOWN_SEGMENTS, SHOWN_TEXTS, SHOWN_TOKENS = 20, 4, 24
"""Of a step whose loss is not finite."""


def take_step(run: Run, micro: Sequence[PackedBatch], step: int, weights: Mapping[str, float], *, times_forward: bool) -> Measured:
    """Forward and backward of every micro-batch, then the update.

    Args:
        micro: this rank's micro-batches of the step, on the CPU.
        step: finished optimizer steps.
        weights: of every term, and of the parameter anchor where it is on.
        times_forward: let a GPU finish each forward pass, so that its time is known.
    Returns:
        what the step was, as values of the host.
    Raises:
        SignalStoreError: if loss or gradient norm is not finite, with the texts of the step; the update is not made then.
    """
    settings, accelerator = run.settings, run.accelerator
    torch.manual_seed(key_of(settings.seed, step, accelerator.process_index) % 2**63)
    rate = settings.optimizer.learning_rate * learning_rate_factor(step, settings.steps, settings.optimizer)
    set_learning_rate(run.optimizer, rate)
    counts, tokens, room = _global_counts(run, micro)
    scales = {name: weights[name] * accelerator.num_processes / max(1.0, count) for name, count in counts.items()}
    accumulated = _accumulate(run, micro, scales, step / settings.steps, times_forward=times_forward)
    reduced = accelerator.reduce(accumulated.flat(), reduction="sum")
    # .item() inside: the anchor's value is formed by itself.
    pulled = {} if run.anchor is None else {"parameter_anchor": run.anchor.pull(weights["parameter_anchor"])}
    norm = run.parallel.clipped_norm(settings.optimizer.clip_norm or math.inf)
    host = torch.cat([reduced, norm.to(reduced)[None]]).cpu()  # the one wait for the step's forward and backward passes
    *_, gradient_norm = host.tolist()
    sums, extras = accumulated.of_flat(host)
    means = {name: value / max(1.0, counts[name]) for name, value in sums.items()} | pulled
    loss = sum(weights[name] * mean for name, mean in means.items() if name != "gate")  # which is not the student's
    if not math.isfinite(loss) or not math.isfinite(gradient_norm):
        raise _not_finite(run, loss, gradient_norm, step, micro)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    fill = tokens / room
    return Measured(loss, gradient_norm, rate, tokens, fill, means, weights, counts, extras, accumulated.forward_seconds)


def record_of(measured: Measured) -> dict[str, float]:
    """The step's line of the log: of each term `<term>_loss` where it was formed, `<term>_weight` and `<term>_count`."""
    by_column = (("loss", measured.means), ("weight", measured.weights), ("count", measured.counts))
    names = dict.fromkeys((*measured.counts, *measured.means))
    return {
        "loss": measured.loss,
        "learning_rate": measured.learning_rate,
        "gradient_norm": measured.gradient_norm,
        "tokens": measured.tokens,
        "row_fill": measured.row_fill,
        **{f"{name}_{what}": by[name] for name in names for what, by in by_column if name in by},
        "forward_seconds": measured.forward_seconds,
    }


def _global_counts(run: Run, micro: Sequence[PackedBatch]) -> tuple[dict[str, float], float, float]:
    """(how much each term counts, real tokens, places for tokens), over all ranks and micro-batches."""
    accelerator, objective = run.accelerator, run.objective
    batches = [packed_batch.batch for packed_batch in micro]
    local = [[*objective.counts(batch).values(), int(batch.real.sum()), batch.real.numel()] for batch in batches]
    alone = accelerator.num_processes == 1  # then they never leave the CPU, and nothing waits
    counts = torch.tensor(local, dtype=torch.float64, device="cpu" if alone else accelerator.device).sum(0)
    *of_terms, tokens, room = accelerator.reduce(counts, reduction="sum").tolist()  # with other ranks: until all have their batch
    return dict(zip(objective.terms, of_terms, strict=True)), tokens, room


@dataclass(slots=True)
class _Accumulated:
    """Sums over this rank's micro-batches, on the device: `sums` float64 [terms], of the terms that were `formed`; `extras` by
    name."""

    terms: tuple[str, ...]
    sums: Tensor
    formed: frozenset[str]
    extras: dict[str, Tensor]
    forward_seconds: float = 0.0

    def add(self, found: Mapping[str, Tensor]) -> None:
        """A micro-batch's sums."""
        self.sums += torch.stack([found[name].double() if name in found else self.sums.new_zeros(()) for name in self.terms])
        self.formed = frozenset(self.terms) & found.keys()
        for name in found.keys() - set(self.terms):
            self.extras[name] = self.extras[name] + found[name] if name in self.extras else found[name]

    def flat(self) -> Tensor:
        """All of them in one, so that ranks meet and the host waits once: float64 [terms and elements of extras]."""
        return torch.cat([self.sums, *(self.extras[name].double().flatten() for name in sorted(self.extras))])

    def of_flat(self, host: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        """(sums of the terms that were formed, extras), of what `flat` has become on the host."""
        sums = dict(zip(self.terms, host.tolist(), strict=False))
        extras, start = {}, len(self.terms)
        for name in sorted(self.extras):
            like = self.extras[name]
            extras[name] = host[start : start + like.numel()].to(like.dtype).view(like.shape)
            start += like.numel()
        return {name: value for name, value in sums.items() if name in self.formed}, extras


def _accumulate(
    run: Run, micro: Sequence[PackedBatch], scales: Mapping[str, float], progress: float, *, times_forward: bool
) -> _Accumulated:
    accelerator, terms = run.accelerator, tuple(run.objective.terms)
    zeros = torch.zeros(len(terms), dtype=torch.float64, device=accelerator.device)
    found = _Accumulated(terms, zeros, frozenset(), {})
    for number, packed_batch in enumerate(micro):
        with run.parallel.micro_step(last=number == len(micro) - 1):
            started = _now(accelerator.device, times_forward)
            with accelerator.autocast():
                total, sums = run.parallel.model(packed_batch.to(accelerator.device), scales, progress)
            found.forward_seconds += _now(accelerator.device, times_forward) - started
            total.backward()
        found.add(sums)
    return found


def _now(device: torch.device, waits: bool) -> float:
    """Seconds; where they are of a forward pass, after a GPU has done what it was told."""
    if waits and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _not_finite(run: Run, loss: float, norm: float, step: int, micro: Sequence[PackedBatch]) -> SignalStoreError:
    """With the segments of the step and how their texts begin, escapes shown."""
    tokenizer: Any = cached_tokenizer(run.cache)
    segments = sorted({segment for packed_batch in micro for segment in packed_batch.contents.segments})
    texts = [f"{n}: {tokenizer.decode(run.cache[n].input_ids[:SHOWN_TOKENS].tolist())!a}" for n in segments[:SHOWN_TEXTS]]
    return SignalStoreError(
        "the loss is not finite",
        found=f"loss {loss}, gradient norm {norm}",
        where=f"step {step}, segments {segments[:SHOWN_SEGMENTS]}, which begin {'; '.join(texts)}",
        remedy="Lower the learning rate, in an out of its own, or look at these texts.",
    )
