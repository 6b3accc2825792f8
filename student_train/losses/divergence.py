"""What a divergence between the teacher's softened distribution p and the student's q is: row by row, in closed form with its
gradient, and the same once more in plain words for autograd, which tests compare.

Legend: N rows, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

LEAST_LOGIT = -1e30
"""Of what cannot come; finite, so that 0 · log 0 is 0."""
Parts = tuple[Tensor, Tensor]
"""(divergence of each row [N] in nats, its gradient with respect to the student's softened logits u = z / T [N, V])."""


@dataclass(frozen=True, slots=True)
class Softened:
    """A distribution of N rows at one temperature: probabilities `p` [N, V], `logits` [N, V] and the logarithm of their powers' sum
    `log_sum` [N, 1], in nats."""

    p: Tensor
    logits: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor) -> "Softened":
        """From logits, with one exponential: on a CPU these passes are what a loss costs."""
        top_N1 = logits_NV.amax(1, keepdim=True)
        p_NV = (logits_NV - top_N1).exp_()
        total_N1 = p_NV.sum(1, keepdim=True)
        return cls(p_NV.div_(total_N1), logits_NV, top_N1 + total_N1.log())

    @property
    def log(self) -> Tensor:
        """log p [N, V]."""
        return self.logits - self.log_sum

    def without(self, columns_V: Tensor) -> "Softened":
        """The distribution given that none of these columns comes."""
        return Softened.of(self.logits.masked_fill(columns_V, LEAST_LOGIT))


class Divergence(ABC):
    """Of q from p; 0 where they are equal."""

    @abstractmethod
    def closed_form(self, teacher: Softened, student: Softened) -> Parts:
        """Rows and gradient, no graph; neither argument is overwritten.

        Args:
            teacher: p, float32 or float64 [N, V]; where V is padded, its rows of padding hold nothing.
            student: q, of the same shape and dtype.
        Returns:
            See `Parts`: float [N], in nats, not reduced; float [N, V].
        """

    @abstractmethod
    def dense(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """The same rows from log-probabilities, for autograd.

        Args:
            log_p_NV: float [N, V], natural logs of the teacher's probabilities; they may be large and negative, not infinite.
            log_q_NV: the student's, in the graph.
        Returns:
            float [N], in nats, not reduced, in the graph.
        """
