"""Cross-entropy and divergences at the output head, behind the choice of how they are computed.

`torch`: a chunked pass that never holds [tokens, vocabulary] (`chunked.py`), with gradients in closed form. `compiled`: the same,
its blocks through torch.compile. `dense`: full logits and autograd, the reference that the others are tested against. Another one,
such as a fused kernel, is a function of the same shape and a line in IMPLEMENTATIONS.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from model_taps.head import OutputHead
from student_train.losses.chunked import chunked_output_loss, compiled_output_loss
from student_train.losses.dense import dense_output_loss
from student_train.losses.head_terms import OutputLoss, OutputTargets, OutputTerm

Impl = Literal["torch", "compiled", "dense"]
IMPLEMENTATIONS: Mapping[Impl, OutputLoss] = {
    "torch": chunked_output_loss,
    "compiled": compiled_output_loss,
    "dense": dense_output_loss,
}


def output_loss(
    hidden_ND: Tensor, head: OutputHead, targets: OutputTargets, terms: Sequence[OutputTerm], *, impl: Impl = "torch"
) -> tuple[Tensor, Tensor]:
    """Σ_k scale_k · Σ_n w_n loss_kn, and the w_n loss_kn.

    loss is -log q(label) or T² · D(p_T, q_T), q = softmax(cap(scale · (W h + b))), p from the cached codes; w the targets' weights
    where the term takes them, else 1.

    Args:
        hidden_ND: what the head reads, float32, float64 or bfloat16 [N, D]; N may be 0.
        head: weight [V, D], bias [V] or None, scale, soft-cap or None. V may be larger than the teacher's vocabulary.
        targets: labels int64 [N]; codes and codec where a term has a divergence.
        terms: those to form, in the order of the rows of what is returned.
        impl: which of IMPLEMENTATIONS.
    Returns:
        Scalar and [terms, N], in nats, float32 (float64 for float64 input); not reduced but for the scales, whose denominators are
        the caller's. Only the scalar is sure to carry a gradient. Matrix products run in the autocast dtype where autocast is on,
        softmax and sums in float32.
    Raises:
        KeyError: for another `impl`.
    """
    loss = IMPLEMENTATIONS[impl]
    if not terms:  # every parameter takes part in every step all the same
        used = [tensor.sum() for tensor in (hidden_ND, head.weight, head.bias) if tensor is not None]
        return 0 * torch.stack(used).sum(), hidden_ND.new_zeros(0, len(hidden_ND))
    return loss(hidden_ND, head, targets, terms)
