"""What a term on the student's states or attention is: a small module that says what it reads, how much of it is in a batch, and
what it sums.

A term's loss is a sum over things that count, float32, in the graph; the step divides by their number over the whole global batch.
It may own parameters (projections, heads, kernels): they train with the student, and no export holds them. A term without
anything to sum gives 0 with a gradient of 0 for everything that it touches.
Legend: B rows, S tokens a row, N rows whose distribution counts, P sampled states, R attention rows, d width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from model_taps.attention import RowQuery
from model_taps.head import OutputHead
from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.reader import TOKENS_ONLY, Needs
from student_train.losses.attention_rows import HeadPairs
from student_train.losses.rows import RowsOf


@dataclass(frozen=True, slots=True)
class Reads:
    """`cache`: signals; `states`: taps of the student by (tap, layer from 1); `rows`: which of its attention rows, of which
    layers."""

    cache: Needs = TOKENS_ONLY
    states: tuple[State, ...] = ()
    rows: Mapping[RowsOf, tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What one forward pass showed. `states` [B, S, d] by tap and layer; `queries` where attention rows of each kind are and
    `rows` [R, H, L] what they say by kind and layer; `final` [B · S, d]
    before the output head; `progress` of the run in [0, 1]."""

    batch: CodedBatch
    codecs: Codecs
    states: Mapping[State, Tensor]
    queries: Mapping[RowsOf, RowQuery]
    rows: Mapping[tuple[RowsOf, int], Tensor]
    final: Tensor
    head: OutputHead
    head_pairs: HeadPairs
    progress: float


def not_cached(term: str, expected: str, cache: Cache, otherwise: str | None = None) -> MismatchError:
    """The refusal of a term whose signal the cache does not hold; `otherwise`: what else than a new cache helps."""
    return MismatchError(
        f"{term} needs a signal that the cache does not hold",
        expected=expected,
        found=[name for name, signal in cache.manifest.signals if signal is not None] or "no signal",
        where=cache.uri,
        remedy=f"Build a cache (or an overlay) with {expected}, or {otherwise or f'switch {term} off'}.",
    )


class StateTerm(nn.Module, ABC):
    """Base of the terms that are not formed in the pass over the output head."""

    reads: Reads

    @abstractmethod
    def count(self, batch: CodedBatch) -> int:
        """How many things of this batch it sums over."""

    @abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Their sum, float32 scalar."""
