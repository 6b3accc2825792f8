"""Divergences between a teacher and a student whose tokens differ: both distributions are brought to outcomes that both can have.

Temperature comes first: p and q are softened over their own vocabularies, and summed then; a sum of powers is not a power of the
sum. A row knows the same text as the teacher's row, or some symbols of the teacher's next token more.
Legend: B rows, V the teacher's vocabulary, W the student's.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from student_train.data.aligned_rows import AlignedRows
from student_train.losses.divergence import Parts, Softened

NOTHING = -1e4
"""log of the mass of an outcome that a distribution cannot have; finite, so that 0 · log 0 is 0."""


RowsKind = Literal["one_to_one", "same_text", "within"]


class AcrossDivergence(nn.Module, ABC):
    """Of the student's q over W tokens from the teacher's p over V others. Its tables are buffers: they go where it goes."""

    of_rows: RowsKind
    """Which rows it says something of."""

    def counts(self, rows: AlignedRows) -> Tensor:
        """bool [B]: the same."""
        found: Tensor = getattr(rows, self.of_rows)
        return found

    @abstractmethod
    def closed_form(self, teacher: Softened, student: Softened, rows: AlignedRows) -> Parts:
        """Rows and gradient, no graph; neither distribution is overwritten.

        Args:
            teacher: p, float32 or float64 [B, V].
            student: q, of the same dtype [B, W].
            rows: of the same B.
        Returns:
            See `Parts`: float [B], in nats, not reduced; float [B, W]. What they hold of rows that do not count means nothing.
        """

    @abstractmethod
    def dense(self, log_p_BV: Tensor, log_q_BW: Tensor, rows: AlignedRows) -> Tensor:
        """The same rows from log-probabilities, for autograd: float [B], in nats, not reduced, in the graph."""


def log_of_sums(log_p_BV: Tensor, outcome_V: Tensor, outcomes: int) -> Tensor:
    """log Σ p over the tokens of each outcome [B, outcomes], for autograd; a large negative number where there are none."""
    columns = [log_p_BV[:, outcome_V == outcome] for outcome in range(outcomes)]
    nothing = log_p_BV.new_full((len(log_p_BV),), NOTHING)
    return torch.stack([c.logsumexp(1) if c.shape[1] else nothing for c in columns], 1)
