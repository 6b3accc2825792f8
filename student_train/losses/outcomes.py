"""A distribution over tokens as one over outcomes, each of which is said by some of the tokens; and a gradient the way back.

Legend: B rows, V tokens, O outcomes.
"""

import torch
from torch import Tensor, nn

from student_train.losses.across import NOTHING
from student_train.losses.divergence import Softened


class Partition(nn.Module):
    """`outcome` int64 [V]: which outcome each token is, below `count`. Outcomes of one token are gathered, the others summed.
    `possible` bool [O]: outcomes that some token says."""

    outcome: Tensor
    possible: Tensor
    single: Tensor
    single_tokens: Tensor

    def __init__(self, outcome_V: Tensor, count: int) -> None:
        super().__init__()
        sizes = torch.bincount(outcome_V, minlength=count)
        token = torch.zeros(count, dtype=torch.int64)
        token[outcome_V] = torch.arange(len(outcome_V))
        self.count = count
        self.says_all = bool((sizes > 0).all())
        self.several = (sizes > 1).nonzero()[:, 0].tolist()
        buffers = {"outcome": outcome_V, "possible": sizes > 0, "single": (sizes == 1).nonzero()[:, 0]}
        buffers["single_tokens"] = token[buffers["single"]]
        buffers |= {f"tokens_{number}": (outcome_V == number).nonzero()[:, 0] for number in self.several}
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def _tokens(self, outcome: int) -> Tensor:
        return self.get_buffer(f"tokens_{outcome}")

    def gather(self, softened: Softened) -> Softened:
        """The distribution over outcomes [B, O]."""
        logits_BO = softened.log_sum.expand(-1, self.count) + NOTHING
        logits_BO[:, self.single] = softened.logits[:, self.single_tokens]
        for number in self.several:
            logits_BO[:, number] = softened.logits[:, self._tokens(number)].logsumexp(1)
        return Softened((logits_BO - softened.log_sum).exp_(), logits_BO, softened.log_sum)

    def spread(self, gradient_BO: Tensor, softened: Softened, outcomes: Softened) -> Tensor:
        """The gradient with respect to the tokens' logits [B, V]: an outcome's part falls to its tokens by their shares of it, for
        its logit is the logarithm of the sum of their exponentials."""
        gradient_BV = torch.zeros_like(softened.p)
        gradient_BV[:, self.single_tokens] = gradient_BO[:, self.single]
        for number in self.several:
            tokens = self._tokens(number)
            share_Bt = (softened.logits[:, tokens] - outcomes.logits[:, number, None]).exp_()
            gradient_BV[:, tokens] = share_Bt.mul_(gradient_BO[:, number, None])
        return gradient_BV
