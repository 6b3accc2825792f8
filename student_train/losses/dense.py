"""The slow, obvious twin of `chunked.py`: full logits, autograd, plain PyTorch. For tests and for reading."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import PADDED_LOGIT, apply_softcap
from student_train.losses.chunked import IGNORE, OutputTargets, OutputTerm
from student_train.losses.divergences import LOG_FLOOR


def dense_output_loss(
    hidden_ND: Tensor, head: OutputHead, targets: OutputTargets, terms: Sequence[OutputTerm]
) -> tuple[Tensor, Tensor]:
    """As `chunked.output_loss`; both carry gradients."""
    logits = apply_softcap(F.linear(hidden_ND, head.weight, head.bias) * head.scale, head.softcap)
    weights = torch.ones_like(logits[:, 0]) if targets.weights is None else targets.weights
    losses = []
    for term in terms:
        if term.kind == "cross_entropy":
            rows = F.cross_entropy(logits, targets.labels, ignore_index=IGNORE, reduction="none")
        else:
            rows = dense_divergence(term, teacher_logprobs(logits, targets, term.temperature), logits)
        losses.append(weights * rows if term.weighted else rows)
    total = sum((term.scale * rows.sum() for term, rows in zip(terms, losses, strict=True)), logits.new_zeros(()))
    return total, torch.stack(losses)


def teacher_logprobs(logits_NV: Tensor, targets: OutputTargets, temperature: float) -> Tensor:
    """log p_T [N, V] from the cache, in the logits' dtype; the tail of a cache without one has the student's own shape."""
    codec, codes = targets.codec, targets.codes
    assert codec is not None
    assert codes is not None
    shape = None if codec.rank else (logits_NV.detach()[:, : codec.vocab_size] / temperature)
    known_NV = codec.logprobs(codes, temperature, shape).to(logits_NV.dtype)
    return F.pad(known_NV, (0, logits_NV.shape[1] - codec.vocab_size), value=PADDED_LOGIT)


def dense_divergence(term: OutputTerm, log_p_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """T² · D of each row [N], in nats; p the teacher's at the term's temperature, q = softmax(z / T)."""
    p, log_q = log_p_NV.exp(), (logits_NV / term.temperature).log_softmax(1)
    q = log_q.exp()
    if term.kind == "tla":
        rows = (p * (log_p_NV - log_q)).sum(1)
    elif term.kind == "reverse_kl":
        rows = (q * (log_q - log_p_NV.clamp(min=LOG_FLOOR))).sum(1)
    elif term.kind == "jsd":
        log_m = (term.beta * p + (1 - term.beta) * q).log()
        rows = (term.beta * p * (log_p_NV - log_m) + (1 - term.beta) * q * (log_q - log_m)).sum(1)
    else:
        rows = 0.5 * (q - p).abs().sum(1)
    return term.temperature**2 * rows
