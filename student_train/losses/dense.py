"""The slow, obvious twin of `chunked.py`: full logits, autograd, plain PyTorch. For tests and for reading.

Legend: N rows whose distribution counts, V vocabulary of the student, D its width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import PADDED_LOGIT, apply_softcap
from student_train.data.unit import IGNORE
from student_train.losses.across import AcrossDivergence
from student_train.losses.divergence import Divergence
from student_train.losses.head_terms import OutputTargets, OutputTerm


def dense_output_loss(
    hidden_ND: Tensor, head: OutputHead, targets: OutputTargets, terms: Sequence[OutputTerm]
) -> tuple[Tensor, Tensor]:
    """See `output_head.output_loss`; both carry gradients."""
    found = F.linear(hidden_ND, head.weight, head.bias)
    logits = apply_softcap(found.to(torch.promote_types(found.dtype, torch.float32)) * head.scale, head.softcap)
    weights = torch.ones_like(logits[:, 0]) if targets.weights is None else targets.weights
    losses = []
    for term in terms:
        if term.divergence is None:
            rows = F.cross_entropy(logits, targets.labels, ignore_index=IGNORE, reduction="none")
        elif isinstance(term.divergence, AcrossDivergence):
            rows = _across(term.divergence, logits, targets, term.temperature)
        else:
            known = teacher_logprobs(logits, targets, term.temperature)
            rows = dense_divergence(term.divergence, known, logits, term.temperature)
        losses.append(weights * rows if term.weighted else rows)
    total = sum((term.scale * rows.sum() for term, rows in zip(terms, losses, strict=True)), logits.new_zeros(()))
    return total, torch.stack(losses)


def _across(divergence: AcrossDivergence, logits_NW: Tensor, targets: OutputTargets, temperature: float) -> Tensor:
    """T² · D of the rows that count, 0 of the others."""
    codec, codes, aligned = targets.codec, targets.codes, targets.aligned
    assert codec is not None
    assert codes is not None
    assert aligned is not None
    counts = divergence.counts(aligned)
    log_p_BV = codec.logprobs(codes[counts], temperature, None).to(logits_NW.dtype)
    rows = divergence.dense(log_p_BV, (logits_NW[counts] / temperature).log_softmax(1), aligned[counts])
    return torch.zeros_like(logits_NW[:, 0]).index_put((counts.nonzero()[:, 0],), temperature**2 * rows)


def teacher_logprobs(logits_NV: Tensor, targets: OutputTargets, temperature: float) -> Tensor:
    """log p_T [N, V] from the cache, in the logits' dtype; the tail of a cache without one has the student's own shape."""
    codec, codes = targets.codec, targets.codes
    assert codec is not None
    assert codes is not None
    shape = None if codec.rank else (logits_NV.detach()[:, : codec.vocab_size] / temperature)
    known_NV = codec.logprobs(codes, temperature, shape).to(logits_NV.dtype)
    return F.pad(known_NV, (0, logits_NV.shape[1] - codec.vocab_size), value=PADDED_LOGIT)


def dense_divergence(divergence: Divergence, log_p_NV: Tensor, logits_NV: Tensor, temperature: float) -> Tensor:
    """T² · D(p, softmax(z / T)), row by row.

    Args:
        log_p_NV: float [N, V], natural logs of the teacher's probabilities at that temperature.
        logits_NV: the student's z, of the same shape and dtype, in the graph.
        temperature: T, above 0.
    Returns:
        float [N], in nats, not reduced.
    """
    return temperature**2 * divergence.dense(log_p_NV, (logits_NV / temperature).log_softmax(1))
