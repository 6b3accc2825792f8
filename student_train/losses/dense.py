"""The slow, obvious twin of `chunked.py`: full logits, autograd, plain PyTorch. For tests and for reading."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.distribution_codec import apply_softcap
from student_train.losses.chunked import IGNORE, OutputScales, OutputTargets


def dense_output_loss(
    hidden_ND: Tensor, head: OutputHead, targets: OutputTargets, scales: OutputScales
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.output_loss`; all three carry gradients."""
    logits = apply_softcap(F.linear(hidden_ND, head.weight, head.bias) * head.scale, head.softcap)
    cross_entropy = F.cross_entropy(logits, targets.labels, ignore_index=IGNORE, reduction="sum")
    tla = torch.zeros_like(cross_entropy)
    if targets.codes is not None and targets.codec is not None:
        scaled = logits / targets.temperature
        logp = targets.codec.logprobs(targets.codes, targets.temperature, scaled.detach()).to(logits.dtype)
        tla = dense_forward_kl(logp, logits, targets.temperature).sum()
    return scales.cross_entropy * cross_entropy + scales.tla * tla, cross_entropy, tla


def dense_forward_kl(logp_NV: Tensor, logits_NV: Tensor, temperature: float) -> Tensor:
    """T² · KL(p ‖ softmax(z / T)) of each row, in nats [N]; `logp_NV` the teacher's at that temperature (Hinton 2015)."""
    logq_NV = (logits_NV / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(logq_NV, logp_NV, reduction="none", log_target=True).sum(1)
