"""What a file of this package exports as TERM; and what a term on the student's states or attention is: a small module that says
what it reads, how much of it is in a batch, and what it sums.

A term's loss is a sum over things that count, float32, in the graph; the step divides by their number over the whole global batch.
It may own parameters (projections, heads, kernels): they train with the student, and no export holds them. A term without
anything to sum gives 0 with a gradient of 0 for everything that it touches.
Legend: B rows, S tokens a row, N rows whose distribution counts, P sampled states, R attention rows, d width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.attention import RowQuery
from model_taps.head import OutputHead
from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from signal_store.format.section import Section
from student_train.align.vocabularies import Vocabularies
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.request import TOKENS_ONLY, SignalRequest
from student_train.losses.across import AcrossDivergence
from student_train.losses.attention_rows import HeadPairs
from student_train.losses.divergence import Divergence
from student_train.losses.kinds import Kind
from student_train.losses.pairing import LayerPair
from student_train.losses.row_queries import RowsOf
from student_train.losses.schedule import WeightField


class TermSection(Section):
    """Base of a term's settings. `weight` as a function of progress; what the class says of itself, `explain` shows."""

    weight: WeightField


@dataclass(frozen=True, kw_only=True)
class Term:
    """What the registry knows of a term; its name is its file's. `section`: its settings, each with a default."""

    section: type[Section]


@dataclass(frozen=True, kw_only=True)
class KnowledgeTerm(Term):
    """A term that has a share in carrying knowledge of some kind."""

    kind: Kind


@dataclass(frozen=True, kw_only=True)
class LogitsTerm(KnowledgeTerm):
    """Formed in the pass over the output head. `divergence` from the teacher's distribution, made from the section (which has a
    `temperature`); None: cross-entropy with the stored labels."""

    divergence: Callable[[Any], Divergence] | None


@dataclass(frozen=True, kw_only=True)
class AcrossTerm(KnowledgeTerm):
    """Formed in the same pass, of a student whose tokens are not its teacher's. `divergence` is made from the section (which has a
    `temperature`) and both vocabularies."""

    divergence: Callable[[Any, Vocabularies], AcrossDivergence]


@dataclass(frozen=True, kw_only=True)
class StateTerm(KnowledgeTerm):
    """A module on the student's states or attention, made from section, cache and student; it refuses what they lack.

    `residue`: the most that is left of its mean where the student is its teacher, which is what the codecs round; None where its
    formula leaves more. `whole_gradient`: False where the formula holds something of the student constant, so that its gradient is
    not the slope of its value. Every term is tested by both. `across`: whether it means the same of a student whose tokens are not
    the cache's, at tokens that end together.
    """

    module: "Callable[[Any, Cache, PreTrainedModel], StateLoss]"
    residue: float | None
    whole_gradient: bool = True
    across: bool = False


@dataclass(frozen=True, kw_only=True)
class GateTerm(KnowledgeTerm):
    """Weighs the temporal terms against each other, and carries nothing by itself."""


@dataclass(frozen=True, kw_only=True)
class RegularisationTerm(Term):
    """Keeps something of the student in bounds, `about` says what, and carries no knowledge."""

    about: str


@dataclass(frozen=True, kw_only=True)
class TokenWeightsTerm(Term):
    """No loss: what the tokens of others count."""


@dataclass(frozen=True, slots=True)
class Reads:
    """`cache`: signals; `states`: taps of the student by (tap, layer from 1); `rows`: which of its attention rows, of which
    layers."""

    cache: SignalRequest = TOKENS_ONLY
    states: tuple[State, ...] = ()
    rows: Mapping[RowsOf, tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True)
class StudentOutputs:
    """Of one forward pass. `states` [B, S, d] by tap and layer; `queries` where attention rows of each kind are and `rows`
    [R, H, L] what they say by kind and layer; `final` [B · S, d] before the output head; `progress` of the run in [0, 1]."""

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


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32; in float64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class StateLoss(nn.Module, ABC):
    """Base of the modules of `StateTerm`."""

    reads: Reads
    matched: tuple[LayerPair, ...] = ()
    """Layers whose heads must be matched before the first step, where it compares head by head."""

    @abstractmethod
    def count(self, batch: CodedBatch) -> int:
        """How many things of this batch it sums over."""

    @abstractmethod
    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Their sum, float32 scalar."""
