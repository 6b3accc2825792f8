"""Another tokenizer, by the likelihood of the text alone: between places where tokens of both end, the student should be as
surprised as the teacher was. It needs no vocabulary in common, and serves students that read bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from model_taps.head import OutputHead
from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.chunks import ChunksPart, ChunksRequest
from student_train.data.request import SignalRequest
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import Reads, StateLoss, StateTerm, StudentOutputs, TermSection, at_least_float32, not_cached

ROWS = 256
"""Whose logits are formed at a time."""
TINY = 1e-6


class LikelihoodSection(TermSection):
    """Another tokenizer: b - a + a log(a / b), a and b what teacher and student are surprised by the text between two places where
    tokens of both end, in nats; mean over such chunks."""

    weight: WeightField = constant(1.0)


def surprise_gap(teacher_G: Tensor, student_G: Tensor) -> Tensor:
    """b - a + a log(a / b): 0 where both are the same, gradient 1 - a / b.

    The limit of the binary cross-entropy between exp(-a / τ) and exp(-b / τ), τ → ∞, times τ, but for what is of the teacher alone.

    Args:
        teacher_G: a, float [G], nats, 0 or more.
        student_G: b, of the same shape and dtype, in the graph.
    Returns:
        float [G], not reduced.
    Source: Minixhofer et al. 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", section 3.
    """
    a, b = teacher_G.clamp(min=0), student_G.clamp(min=TINY)
    return b - a + torch.xlogy(a, a) - a * b.log()


def token_losses(hidden_MD: Tensor, head: OutputHead, labels_M: Tensor) -> Tensor:
    """-log q(label) of each row [M], float32, in the graph; logits are formed some rows at a time, and again on the way back."""

    def some(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(head.logits(hidden)), labels, reduction="none")

    parts = zip(hidden_MD.split(ROWS), labels_M.split(ROWS), strict=True)
    return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])


class Likelihood(StateLoss):
    """Of every chunk all of whose tokens count."""

    def __init__(self, _section: LikelihoodSection, cache: Cache, _student: PreTrainedModel) -> None:
        super().__init__()
        if cache.manifest.signals.distribution is None:
            raise not_cached("likelihood", "signals.distribution", cache)
        self.reads = Reads(SignalRequest.of(ChunksRequest()))

    def count(self, batch: CodedBatch) -> int:
        """Chunks."""
        part = batch.part(ChunksPart)
        return 0 if part is None else len(part.teacher)

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Over chunks."""
        part = outputs.batch.part(ChunksPart)
        if part is None or not len(part.flat):
            return 0 * (outputs.final.sum() + outputs.head.weight.sum())
        losses_M = token_losses(outputs.final[part.flat], outputs.head, part.labels)
        student_G = losses_M.new_zeros(len(part.teacher)).index_add(0, part.chunk, losses_M)
        return surprise_gap(part.teacher.to(student_G.dtype), student_G).sum()


TERM = StateTerm(section=LikelihoodSection, kind=Kind.EXPLICIT, module=Likelihood, residue=1e-4, across=True)
