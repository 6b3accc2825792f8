"""From a recipe's terms to what computes them and what they need: refused at start where the cache does not hold it, never at step
1000.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import torch
from transformers import PreTrainedModel

from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.errors import MismatchError, SignalStoreError
from student_train.data.aligned_rows import AlignedRows
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.distribution import DistributionRequest
from student_train.data.signals.tags import TagsRequest
from student_train.importance.rules import load_rules
from student_train.importance.token_weights import TokenWeights
from student_train.losses import registry
from student_train.losses.across import AcrossDivergence
from student_train.losses.across_check import across_of, check_tokens
from student_train.losses.checks import check_distribution, check_tags, check_tail_rank, check_temperatures
from student_train.losses.gate import Gate
from student_train.losses.head_terms import OutputTerm
from student_train.losses.pairing import LayerPair
from student_train.losses.parameter_anchor import ParameterAnchorSection
from student_train.losses.router_balance import RouterBalance, RouterBalanceSection, resolve_balance
from student_train.losses.row_queries import RowsOf
from student_train.losses.section import Losses
from student_train.losses.temporal import TemporalLoss
from student_train.losses.term import AcrossTerm, GateTerm, LogitsTerm, RegularisationTerm, StateLoss, TermSection


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms that are on, and what computes those on states (`states`, by name, the student's parameters not among theirs)."""

    losses: Losses
    states: Mapping[str, StateLoss]
    token_weights: TokenWeights | None = None
    """Gives the weights of the divergences' tokens, where they have any."""
    gate: Gate | None = None
    across: Mapping[str, AcrossDivergence] = field(default_factory=dict)
    """By name, what compares a student whose tokens are others."""
    balance: RouterBalance | None = None
    """Of the student's experts, where `losses.router_balance` is on."""

    def to(self, device: torch.device) -> None:
        """Move the tables of what compares across vocabularies, which are no part of the wrapped module: DDP would send them."""
        for divergence in self.across.values():
            divergence.to(device)

    @property
    def terms(self) -> dict[str, TermSection | RouterBalanceSection]:
        """Terms that are on, by name; the anchor of the parameters, which counts no token, is not among them."""
        return {name: section for name, section in self.losses if isinstance(section, TermSection | RouterBalanceSection)}

    @property
    def needs(self) -> SignalRequest:
        """What is read of the cache besides tokens."""
        own = {DistributionRequest(): bool(self.losses.divergences), TagsRequest(): self.token_weights is not None}
        parts = [SignalRequest.of(*(request for request, asked in own.items() if asked))]
        parts += [] if self.gate is None else [self.gate.reads.cache]
        return reduce(or_, (term.reads.cache for term in self.states.values()), reduce(or_, parts))

    @property
    def student_states(self) -> tuple[State, ...]:
        """Taps of the student, each once."""
        return tuple(dict.fromkeys(state for term in self.states.values() for state in term.reads.states))

    @property
    def student_rows(self) -> dict[RowsOf, tuple[int, ...]]:
        """By kind of rows, the student's layers whose attention is looked at."""
        found: dict[RowsOf, tuple[int, ...]] = {}
        for term in self.states.values():
            for kind, layers in (term.reads.rows or {}).items():
                found[kind] = tuple(dict.fromkeys((*found.get(kind, ()), *layers)))
        return found

    @property
    def matched_layers(self) -> tuple[LayerPair, ...]:
        """The layers whose heads must be matched once."""
        return tuple(dict.fromkeys(pair for term in self.states.values() for pair in term.matched))

    def counts(self, batch: CodedBatch) -> dict[str, float]:
        """By term, how many of its own things are in a batch; of weighted divergences, what their weights add up to."""
        known, found = registry.terms(), dict[str, float]()
        for name in self.terms:
            match known[name]:
                case LogitsTerm(divergence=None):
                    found[name] = int((batch.labels >= 0).sum())
                case LogitsTerm():
                    found[name] = self._weighed_rows(batch)
                case AcrossTerm():
                    aligned = batch.part(AlignedRows)
                    found[name] = 0 if aligned is None else int(self.across[name].counts(aligned).sum())
                case GateTerm():
                    levels = () if self.gate is None else self.gate.levels
                    found[name] = sum(self.states[level].count(batch) for level in levels)
                case RegularisationTerm():
                    found[name] = int(batch.real.sum())
                case _:
                    found[name] = self.states[name].count(batch)
        return found

    def _weighed_rows(self, batch: CodedBatch) -> float:
        importance = self.losses.importance
        if batch.importance is None or importance is None or importance.normalise == "tokens":
            return len(batch.flat)
        return float(batch.importance.sum())

    def output_terms(self, scales: Mapping[str, float]) -> dict[str, OutputTerm]:
        """The terms of the pass over the output head that weigh something, by name; for a gate, which looks at their losses, all of
        them, and cross-entropy in any case."""
        terms, measured = dict[str, OutputTerm](), dict[str, OutputTerm]()
        for name, spec in registry.terms().items():
            section = getattr(self.losses, name)
            if isinstance(spec, AcrossTerm) and section is not None:
                terms[name] = OutputTerm(self.across[name], scales[name], section.temperature, weighted=False)
            if not isinstance(spec, LogitsTerm):
                continue
            if section is None and spec.divergence is None:
                measured[name] = OutputTerm(None, 0.0, weighted=False)
            elif spec.divergence is None:
                terms[name] = OutputTerm(None, scales[name], weighted=False)
            elif section is not None:
                terms[name] = OutputTerm(spec.divergence(section), scales[name], section.temperature)
        if self.gate is None:
            return {name: term for name, term in terms.items() if term.scale}
        return dict(sorted((terms | measured).items(), key=lambda item: item[1].scale == 0))

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term at a progress in [0, 1], the anchor's too."""
        weighed = TermSection | ParameterAnchorSection | RouterBalanceSection
        sections = {name: section for name, section in self.losses if isinstance(section, weighed)}
        return {name: section.weight.at(progress) for name, section in sections.items() if section.weight is not None}


def resolve(losses: Losses, cache: Cache, student: PreTrainedModel, tail_rank: int | None = None) -> Objective:
    """Make what computes the terms; of the cached tail, `tail_rank` directions are used. MismatchError naming the term and what the
    cache or the student lacks."""
    check_tail_rank(losses, cache, tail_rank)
    check_distribution(losses, cache)
    given = "router_balance" in losses.model_fields_set
    section, balance = resolve_balance(losses.router_balance, given=given, student=student)
    if section is not losses.router_balance:
        losses = losses.model_copy(update={"router_balance": section})
    token_weights = None
    if losses.importance is not None:
        check_tags(losses, cache)
        token_weights = TokenWeights.of(load_rules(losses.importance.rules), cache.manifest.tokenizer.vocab_size)
    states = _states(losses, cache, student)
    check_temperatures(losses, cache)  # after what is not there at all
    across = across_of(losses, states, cache, student, tail_rank)
    return Objective(losses, states, token_weights, _gate(losses, states, cache), across, balance)


def refusals(cache: Cache, student: PreTrainedModel) -> dict[str, str]:
    """By term that this cache or student cannot have, with its default settings: why."""
    found = {}
    for name in registry.kinds():
        spec = registry.terms()[name]
        divergence = isinstance(spec, AcrossTerm) or (isinstance(spec, LogitsTerm) and spec.divergence is not None)
        losses = Losses.of({name: {"temperature": 1.0} if divergence else {}})  # the temperature that every cache serves
        try:
            check_distribution(losses, cache)
            states = _states(losses, cache, student)
            check_temperatures(losses, cache)
            check_tokens(losses, states, cache, None)
        except SignalStoreError as error:
            found[name] = error.what + (f": expected {error.expected}" if error.expected else "")
    return found


def _states(losses: Losses, cache: Cache, student: PreTrainedModel) -> dict[str, StateLoss]:
    sections = {name: getattr(losses, name) for name in registry.state_terms()}
    return {
        name: registry.state_terms()[name].module(section, cache, student)
        for name, section in sections.items()
        if section is not None
    }


def _gate(losses: Losses, states: Mapping[str, StateLoss], cache: Cache) -> Gate | None:
    if losses.gate is None:
        return None
    levels = [name for name, term in states.items() if isinstance(term, TemporalLoss)]
    if len(levels) < 2:
        raise MismatchError(
            "the gate weighs temporal terms against each other",
            expected="two of smoothness, attention_evolution, replay",
            found=", ".join(levels) or "none",
            where="losses.gate",
            remedy="Switch the gate off: losses.gate: null.",
        )
    if cache.manifest.signals.distribution is None:
        raise MismatchError(
            "the gate looks at the teacher's entropy", expected="signals.distribution", found="none", where=cache.uri
        )
    return Gate(losses.gate, levels, cache)
