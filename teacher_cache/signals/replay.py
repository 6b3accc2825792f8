"""The path of a final hidden state up the gradient of its own loss (REQUIREMENTS 32 A): how the teacher's meaning would decay.

From h⁰, the last block's output at a position, K steps h^{j+1} = h^j + η‖h⁰‖ g/‖g‖ with g = ∂(-log p(next token))/∂h through
the frozen final norm and output head alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsOf = Callable[[Tensor], Tensor]
"""From states before the final norm [P, D] to logits [P, V]."""


@dataclass(frozen=True, slots=True)
class Path:
    """`steps` [P, K, D]: h^j - h⁰ for j = 1..K; `nll` [P, K + 1] nats at each state, h⁰ first."""

    steps: Tensor
    nll: Tensor


def ascend(logits_of: LogitsOf, states_PD: Tensor, labels_P: Tensor, steps: int, step_size: float) -> Path:
    """The path of each state, in float32."""
    start = states_PD.detach().float()
    length_P1 = step_size * start.norm(dim=1, keepdim=True)
    state, states, losses = start, [], []
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            leaf = state.clone().requires_grad_()
            nll_P = F.cross_entropy(logits_of(leaf), labels_P.clone(), reduction="none")
            (gradient,) = torch.autograd.grad(nll_P.sum(), leaf)
            losses.append(nll_P.detach())
            state = state + length_P1 * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            states.append(state - start)
    losses.append(F.cross_entropy(logits_of(state), labels_P, reduction="none"))
    return Path(torch.stack(states, 1), torch.stack(losses, 1))
