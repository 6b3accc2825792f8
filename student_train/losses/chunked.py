"""Cross-entropy and forward KL to the cached distribution in one pass over the output head, never holding [tokens, vocabulary].

The pass walks the tokens in chunks: multiply by the head, form the loss of each row and dL/dz in closed form, and add what
that gives for the hidden state and the head. Its slow twin is `dense.py`.
Legend: N tokens that count, V vocabulary of the student, D its width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.distribution_codec import DistributionCodec, DistributionCodes

LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Of one chunk of logits: what stays in a core's cache, or what keeps a GPU busy."""
IGNORE = -100


@dataclass(frozen=True, slots=True)
class OutputTargets:
    """What the rows are compared with. `labels` int64 [N], IGNORE where none is stored; `codes` of the same rows, or None."""

    labels: Tensor
    codes: DistributionCodes | None
    codec: DistributionCodec | None
    temperature: float


@dataclass(frozen=True, slots=True)
class OutputScales:
    """What a row's loss is multiplied by in the total: weight / global count (times ranks). 0 switches a term off."""

    cross_entropy: float
    tla: float


def _softmax(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [N, V], logsumexp [N])."""
    top_N1 = logits_NV.amax(1, keepdim=True)
    power_NV = (logits_NV - top_N1).exp_()
    sum_N1 = power_NV.sum(1, keepdim=True)
    return power_NV.mul_(1 / sum_N1), (top_N1 + sum_N1.log())[:, 0]


def cross_entropy_chunk(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ -log q(label) in nats, dL/dz [N, V]) over rows that have a label."""
    known_N = labels_N != IGNORE
    target_N1 = labels_N.clamp(min=0)[:, None]
    grad_NV, logsum_N = _softmax(logits_NV)
    loss = ((logsum_N - logits_NV.gather(1, target_N1)[:, 0]) * known_N).sum()
    grad_NV.scatter_add_(1, target_N1, torch.full_like(target_N1, -1, dtype=grad_NV.dtype))
    return loss, grad_NV if bool(known_N.all()) else grad_NV.mul_(known_N[:, None])


def forward_kl_chunk(
    logits_NV: Tensor, codes: DistributionCodes, codec: DistributionCodec, temperature: float
) -> tuple[Tensor, Tensor]:
    """(T² Σ KL(p_T ‖ q_T) in nats, dL/dz = T (q - p) [N, V]); p from the cache. KL = Σ p log p - Σ p z/T + logsumexp(z/T)."""
    scaled_NV = logits_NV if temperature == 1 else logits_NV / temperature
    p_NV, negative_entropy_N = codec.probabilities(codes, temperature, scaled_NV)
    q_NV, logsum_N = _softmax(scaled_NV)
    p_NV = p_NV.to(q_NV.dtype)
    loss = temperature**2 * (negative_entropy_N - torch.linalg.vecdot(p_NV, scaled_NV) + logsum_N * p_NV.sum(1)).sum()
    grad_NV = q_NV.sub_(p_NV)
    return loss, grad_NV if temperature == 1 else grad_NV.mul_(temperature)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: OutputHead,
        targets: OutputTargets,
        scales: OutputScales,
        compute_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_VD.to(compute_dtype)
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=precise) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=precise) if bias_V is not None and ctx.needs_input_grad[2] else None
        sums = hidden_ND.new_zeros(2, dtype=precise)
        step = max(1, LOGITS_BYTES.get(hidden_ND.device.type, 2**26) // (4 * len(weight_VD)))
        for start in range(0, len(hidden_ND), step):
            rows = slice(start, start + step)
            hidden = hidden_ND[rows].to(compute_dtype)
            logits = torch.nn.functional.linear(hidden, weight, None if bias_V is None else bias_V.to(compute_dtype)).to(precise)
            if head.scale != 1:
                logits = logits * head.scale
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            grad_logits = None
            if scales.cross_entropy or targets.codes is None:
                sums[0], grad_logits = _add(
                    sums[0], grad_logits, cross_entropy_chunk(logits, targets.labels[rows]), scales.cross_entropy
                )
            if scales.tla and targets.codes is not None and targets.codec is not None:
                parts = forward_kl_chunk(logits, targets.codes[rows], targets.codec, targets.temperature)
                sums[1], grad_logits = _add(sums[1], grad_logits, parts, scales.tla)
            if grad_logits is None:
                continue
            if head.softcap is not None:
                grad_logits = grad_logits * (1 - (logits / head.softcap).square())
            if head.scale != 1:
                grad_logits = grad_logits * head.scale
            low = grad_logits.to(compute_dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (low @ weight).to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight += low.T @ hidden
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        total = scales.cross_entropy * sums[0] + scales.tla * sums[1]
        cross_entropy, tla = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, tla)
        return total, cross_entropy, tla

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        total = grad_outputs[0]
        hidden, weight, bias = ctx.grads
        grads = (
            None if hidden is None else hidden * total.to(hidden.dtype),
            None if weight is None else (weight * total).to(ctx.dtypes[0]),
            None if bias is None else (bias * total).to(ctx.dtypes[1]),
        )
        return (*grads, None, None, None, None)


def _add(total: Tensor, grad: Tensor | None, parts: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    loss, grad_loss = parts
    grad_loss = grad_loss.mul_(scale)
    return total + loss, grad_loss if grad is None else grad.add_(grad_loss)


def output_loss(hidden_ND: Tensor, head: OutputHead, targets: OutputTargets, scales: OutputScales) -> tuple[Tensor, Tensor, Tensor]:
    """(scaled total, Σ cross-entropy, Σ T²·KL), scalars in nats; only the total carries a gradient.

    The head's matrix products run in the autocast dtype where autocast is on, softmax and sums in float32 (float64 for float64
    input).
    """
    device = hidden_ND.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    with torch.autocast(device, enabled=False):
        apply: Any = _ChunkedLoss.apply
        total, cross_entropy, tla = apply(hidden_ND, head.weight, head.bias, head, targets, scales, compute)
    return total, cross_entropy, tla
