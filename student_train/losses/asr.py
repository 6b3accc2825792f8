"""ASR: sparsity of the student's FFN activations (REQUIREMENTS 71), the mean or the sum over units of |a|. It needs no teacher."""

from torch import Tensor
from transformers import PreTrainedModel

from model_taps.blocks import mean_abs_activation, num_layers
from signal_store.cache import Cache
from student_train.batch import CodedBatch
from student_train.losses.config import AsrTerm
from student_train.losses.term import Reads, Seen, StateTerm


class Asr(StateTerm):
    """See the module."""

    def __init__(self, section: AsrTerm, _cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        self.sums = section.reduction == "sum"
        self.reads = Reads(states=tuple(("ffn_activation", layer) for layer in range(1, num_layers(student) + 1)))

    def count(self, batch: CodedBatch) -> int:
        """Tokens."""
        return int(batch.real.sum())

    def forward(self, seen: Seen) -> Tensor:
        """Mean over blocks."""
        activations = [seen.states[state] for state in self.reads.states]
        units = activations[0].shape[-1] if self.sums else 1
        return mean_abs_activation(activations, seen.batch.real) * seen.batch.real.sum() * units
