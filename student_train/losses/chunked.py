"""Cross-entropy and divergences from the cached distribution in one pass over the output head, never holding [tokens, vocabulary].

The pass walks the tokens in chunks, large enough that reading the head's weights is shared by many tokens, and within a chunk in
blocks, small enough to stay in a core's cache: the losses of a block and dL/dz in closed form, which takes the logits' place; then
what the chunk gives for hidden states and head. Its slow twin is `dense.py`.
Legend: N tokens that count, V vocabulary of the student, D its width, C tokens of a chunk, B tokens of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import PADDED_LOGIT, KnownMasses
from student_train.data.aligned_rows import AlignedRows
from student_train.data.unit import IGNORE
from student_train.losses.across import AcrossDivergence
from student_train.losses.divergence import Divergence, Parts, Softened
from student_train.losses.head_terms import OutputTargets, OutputTerm

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Of the float32 logits of a chunk."""
BLOCK_BYTES = {"cpu": 2**19, "cuda": 512 * 2**20}
"""Of the float32 logits of a block: several of them stay in a core's cache; a GPU needs no blocks."""


@dataclass(frozen=True, slots=True)
class _Block:
    """What the losses of a block's rows are formed from. `known`: of the teacher, by temperature; `tail` [B, V of the cache]: the
    low-rank logits at T = 1, or None."""

    labels: Tensor
    known: dict[float, KnownMasses]
    tail: Tensor | None
    weights: Tensor | None
    vocab_size: int
    """Of the cache; the student's may be padded, or another."""
    aligned: AlignedRows | None

    def part(self, rows: slice) -> "_Block":
        """Some of the rows."""
        known = {temperature: known[rows] for temperature, known in self.known.items()}
        tail, weights = (None if whole is None else whole[rows] for whole in (self.tail, self.weights))
        aligned = None if self.aligned is None else self.aligned[rows]
        return _Block(self.labels[rows], known, tail, weights, self.vocab_size, aligned)


def _block_losses(
    logits_BV: Tensor,
    block: _Block,
    terms: Sequence[OutputTerm],
    slopes: Sequence[float] | Tensor,
) -> tuple[list[Tensor], Tensor, Any]:
    """(loss of each row by term [B], gradient [B, V], factor): the gradient of Σ scale · loss is factor · gradient."""
    students: dict[float, Softened] = {}
    teachers: dict[float, Softened] = {}
    losses: list[Tensor] = []
    gradient_BV: Tensor | None = None
    factor: Any = 1.0
    for number, term in enumerate(terms):
        temperature = term.temperature
        if temperature not in students:
            scaled_BV = logits_BV if temperature == 1 else logits_BV / temperature
            students[temperature] = Softened.of(scaled_BV)
        student, slope = students[temperature], slopes[number]
        measured = gradient_BV is not None and isinstance(slope, float) and slope == 0  # its loss is looked at, no more
        if term.divergence is None:
            known_B = block.labels != IGNORE
            target_B1 = block.labels.clamp(min=0)[:, None]
            losses.append((student.log_sum - student.logits.gather(1, target_B1))[:, 0] * known_B)
            if measured:
                continue
            found_BV = student.p * known_B[:, None]
            found_BV.scatter_add_(1, target_B1, -known_B[:, None].to(found_BV.dtype))
        else:
            if temperature not in teachers:
                teachers[temperature] = _teacher(block, temperature, student)
            divergence_B, found_BV = _compared(term.divergence, teachers[temperature], student, block)
            losses.append(temperature**2 * divergence_B)
        if term.weighted and block.weights is not None:
            losses[-1] = losses[-1] * block.weights
            found_BV = found_BV.mul_(block.weights[:, None])
        if gradient_BV is None:
            gradient_BV, factor = found_BV, slope
        else:
            gradient_BV = gradient_BV.mul_(factor) if number == 1 else gradient_BV
            gradient_BV, factor = gradient_BV.add_(found_BV.mul_(slope)), 1.0
    assert gradient_BV is not None
    return losses, gradient_BV, factor


def _teacher(block: _Block, temperature: float, student: Softened) -> Softened:
    """p [B, V]; the rows that pad the student's vocabulary hold nothing. A cache without a tail borrows the student's shape."""
    if block.tail is None:
        tail_BV = student.logits[:, : block.vocab_size].clone()
    else:
        tail_BV = block.tail if temperature == 1 else block.tail / temperature
    log_BV, p_BV = (found.to(student.p.dtype) for found in block.known[temperature].softened(tail_BV))
    padding = student.p.shape[1] - tail_BV.shape[1]
    if padding and block.aligned is None:
        log_BV, p_BV = F.pad(log_BV, (0, padding), value=PADDED_LOGIT), F.pad(p_BV, (0, padding))
    return Softened(p_BV, log_BV, log_BV.new_zeros(len(log_BV), 1))


def _compared(divergence: Divergence | AcrossDivergence, teacher: Softened, student: Softened, block: _Block) -> Parts:
    """Rows and gradient; across vocabularies, 0 of rows that do not count."""
    if not isinstance(divergence, AcrossDivergence):
        return divergence.closed_form(teacher, student)
    assert block.aligned is not None
    counts_B = divergence.counts(block.aligned)
    rows_B, gradient_BV = divergence.closed_form(teacher, student, block.aligned)
    return rows_B.where(counts_B, 0), gradient_BV.mul_(counts_B[:, None])


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything of a pass that carries no gradient."""

    head: OutputHead
    targets: OutputTargets
    terms: tuple[OutputTerm, ...]
    compute_dtype: torch.dtype
    compiled: bool


def _do_chunk(logits_CV: Tensor, rows: slice, job: _Job, losses_KC: Tensor, precise: torch.dtype) -> float:
    """Put the losses of a chunk's rows, by term, into `losses_KC`, and put the gradient in the place of its logits; returns the
    gradient's factor."""
    head, targets, codec = job.head, job.targets, job.targets.codec
    temperatures = {term.temperature for term in job.terms if term.divergence is not None}
    chunk = _Block(targets.labels[rows], {}, None, None if targets.weights is None else targets.weights[rows], 0, None)
    if temperatures:
        assert codec is not None
        assert targets.codes is not None
        codes = targets.codes[rows]
        known = {temperature: codec.known(codes, temperature) for temperature in temperatures}
        chunk = replace(chunk, known=known, tail=codec.tail_logits(codes) if codec.rank else None, vocab_size=codec.vocab_size)
    if targets.aligned is not None:
        chunk = replace(chunk, aligned=targets.aligned[rows])
    size = max(1, BLOCK_BYTES.get(logits_CV.device.type, 2**30) // (4 * logits_CV.shape[1]))
    slopes = [term.scale * term.temperature for term in job.terms]
    plain = tuple(replace(term, scale=0.0) for term in job.terms)  # what torch.compile specialises on must not change with the step
    factor: Any = 1.0
    for first in range(0, len(logits_CV), size):
        part = slice(first, first + size)
        logits_BV = logits_CV[part].to(precise)
        if head.scale != 1:
            logits_BV = logits_BV * head.scale
        if head.softcap is not None:
            logits_BV = head.softcap * torch.tanh(logits_BV / head.softcap)
        block = chunk.part(part)
        if job.compiled and len(logits_BV) == size:
            losses, gradient_BV, factor = _compiled()(logits_BV, block, plain, logits_BV.new_tensor(slopes))
        else:
            losses, gradient_BV, factor = _block_losses(logits_BV, block, plain, slopes)
        if head.softcap is not None:
            gradient_BV = gradient_BV * (1 - (logits_BV / head.softcap).square())
        losses_KC[:, part] = torch.stack(losses)
        logits_CV[part] = gradient_BV
    return float(factor) * head.scale


@cache
def _compiled() -> Callable[..., tuple[list[Tensor], Tensor, Any]]:
    return torch.compile(_block_losses, dynamic=False)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_VD.to(job.compute_dtype)
        bias = None if bias_V is None else bias_V.to(job.compute_dtype)
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=precise) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=precise) if bias_V is not None and ctx.needs_input_grad[2] else None
        losses_KN = hidden_ND.new_zeros(len(job.terms), len(hidden_ND), dtype=precise)
        step = max(1, CHUNK_BYTES.get(hidden_ND.device.type, 2**26) // (4 * len(weight_VD)))
        for start in range(0, len(hidden_ND), step):
            rows = slice(start, start + step)
            hidden = hidden_ND[rows].to(job.compute_dtype)
            logits_CV = F.linear(hidden, weight, bias)
            factor = _do_chunk(logits_CV, rows, job, losses_KN[:, rows], precise)
            gradient_CV = logits_CV
            # The factor, a weight over a count, stays out of bfloat16, which would round it by up to 0.4 %.
            if grad_hidden is not None:
                grad_hidden[rows] = (gradient_CV @ weight).to(precise).mul_(factor)
            if grad_weight is not None and grad_weight.dtype == gradient_CV.dtype:
                grad_weight.addmm_(gradient_CV.T, hidden, alpha=factor)
            elif grad_weight is not None:
                grad_weight.add_(gradient_CV.T @ hidden, alpha=factor)
            if grad_bias is not None:
                grad_bias.add_(gradient_CV.sum(0, dtype=precise), alpha=factor)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        scales = losses_KN.new_tensor([term.scale for term in job.terms])
        ctx.mark_non_differentiable(losses_KN)
        return (scales * losses_KN.sum(1)).sum(), losses_KN

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        total = grad_outputs[0]
        hidden, weight, bias = ctx.grads
        grads = (
            None if hidden is None else hidden * total.to(hidden.dtype),
            None if weight is None else (weight * total).to(ctx.dtypes[0]),
            None if bias is None else (bias * total).to(ctx.dtypes[1]),
        )
        return (*grads, None)


def _chunked(
    compiled: bool, hidden_ND: Tensor, head: OutputHead, targets: OutputTargets, terms: Sequence[OutputTerm]
) -> tuple[Tensor, Tensor]:
    device = hidden_ND.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    with torch.autocast(device, enabled=False):
        apply: Any = _ChunkedLoss.apply
        total, losses_KN = apply(hidden_ND, head.weight, head.bias, _Job(head, targets, tuple(terms), compute, compiled))
    return total, losses_KN


chunked_output_loss = partial(_chunked, False)
"""See `output_head.output_loss`; the losses of the rows carry no gradient."""
compiled_output_loss = partial(_chunked, True)
"""The same, the blocks' losses through torch.compile."""
