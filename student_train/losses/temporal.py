"""The levels of temporal consistency: terms that say of each token what it adds, so that a gate may weigh them token by token.
Without a gate each is a term like any other."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from student_train.losses.term import StateLoss, StudentOutputs


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """`value` float32 [M] in the graph, of the tokens at `flat` int64 [M] (b * S + s); `rest`: a scalar of 0 that keeps parameters
    in the graph where M is 0."""

    flat: Tensor
    value: Tensor
    rest: Tensor | None = None

    def sum(self) -> Tensor:
        """Of all tokens."""
        total = self.value.sum()
        return total if self.rest is None else total + self.rest


class TemporalLoss(StateLoss):
    """Base of the levels."""

    @abstractmethod
    def per_token(self, outputs: StudentOutputs) -> TokenLosses:
        """What its sum is made of."""

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Sum over tokens."""
        return self.per_token(outputs).sum()
