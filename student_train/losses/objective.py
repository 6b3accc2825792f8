"""From a recipe's terms to what computes them and what they need: refused at start where the cache does not hold it, never at step
1000.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from transformers import PreTrainedModel

from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.errors import MismatchError, SignalStoreError
from student_train.data.batch import CodedBatch
from student_train.data.reader import Needs
from student_train.importance.rules import load_rules
from student_train.importance.weigher import Weigher
from student_train.losses.apc import Apc
from student_train.losses.asr import make_asr
from student_train.losses.attention_statistics import AttentionStatistics
from student_train.losses.chunked import OutputTerm
from student_train.losses.cka import ResidualCka
from student_train.losses.config import DIVERGENCES, KIND_OF, JsdTerm, Losses, ParameterAnchorTerm, RouterBalanceTerm, Term
from student_train.losses.coverage import Coverage
from student_train.losses.direction import Direction
from student_train.losses.evidence import Evidence
from student_train.losses.evolution import AttentionEvolution
from student_train.losses.gate import Gate
from student_train.losses.level import Level
from student_train.losses.lhsm import Lhsm
from student_train.losses.mmd import ActivationMmd
from student_train.losses.pairing import LayerPair
from student_train.losses.reconstruction import InputReconstruction
from student_train.losses.replay import Replay
from student_train.losses.router_balance import RouterBalance, with_balance
from student_train.losses.rows import RowsOf
from student_train.losses.smoothness import Smoothness
from student_train.losses.term import StateTerm, not_cached

MIN_HEAD_MASS = 0.9
"""Least mean mass of the head at which a cache without a tail serves a temperature."""

STATE_TERMS: dict[str, Callable[[Any, Cache, PreTrainedModel], StateTerm]] = {
    "lhsm": Lhsm,
    "apc": Apc,
    "asr": make_asr,
    "attention_direction": partial(Direction, tap="attention_output", name="attention_direction"),
    "normalised_direction": partial(Direction, tap="ffn_input", name="normalised_direction"),
    "activation_mmd": ActivationMmd,
    "input_reconstruction": InputReconstruction,
    "residual_cka": ResidualCka,
    "attention_statistics": AttentionStatistics,
    "smoothness": Smoothness,
    "attention_evolution": AttentionEvolution,
    "replay": Replay,
    "evidence": Evidence,
    "coverage": Coverage,
}
"""What computes each term that is not formed in the pass over the output head."""
SIGNALS = {"lhsm": "hidden", "apc": "attention"}
"""What a term cannot do without, where its own refusal would say less."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms that are on, and what computes those on states (`states`, by name, the student's parameters not among theirs)."""

    losses: Losses
    states: Mapping[str, StateTerm]
    weigher: Weigher | None = None
    """Gives the weights of the divergences' tokens, where they have any."""
    gate: Gate | None = None
    balance: RouterBalance | None = None
    """Of the student's experts, where `losses.router_balance` is on."""

    @property
    def terms(self) -> dict[str, Term | RouterBalanceTerm]:
        """Terms that are on, by name; the anchor of the parameters, which counts no token, is not among them."""
        return {name: term for name, term in self.losses if isinstance(term, Term | RouterBalanceTerm)}

    @property
    def needs(self) -> Needs:
        """What is read of the cache besides tokens."""
        start = Needs(bool(self.losses.divergences), (), (), tags=self.weigher is not None)
        start = start if self.gate is None else start.union(self.gate.reads.cache)
        return reduce(Needs.union, (term.reads.cache for term in self.states.values()), start)

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
        for name in ("apc", "attention_evolution"):
            if name in self.states:
                return self.states[name].pairs  # type: ignore[return-value]
        return ()

    def counts(self, batch: CodedBatch) -> dict[str, float]:
        """By term, how many of its own things are in a batch; of weighted divergences, what their weights add up to."""
        found: dict[str, float] = {}
        importance = self.losses.importance
        by_weight = batch.importance is not None and importance is not None and importance.normalise == "weights"
        rows = float(batch.importance.sum()) if by_weight and batch.importance is not None else len(batch.flat)
        for name in self.terms:
            if name in self.states:
                found[name] = self.states[name].count(batch)
            elif name == "gate" and self.gate is not None:
                found[name] = sum(self.states[level].count(batch) for level in self.gate.levels)
            elif name == "router_balance":
                found[name] = int(batch.real.sum())
            else:
                found[name] = int((batch.labels >= 0).sum()) if name == "cross_entropy" else rows
        return found

    def output_terms(self, scales: Mapping[str, float]) -> list[OutputTerm]:
        """The terms of the pass over the output head that weigh something, by name in `kind`; for a gate, which looks at their
        losses, all of them, and cross-entropy in any case."""
        terms = [OutputTerm("cross_entropy", scales["cross_entropy"], weighted=False)] if self.losses.cross_entropy else []
        for name, term in self.losses.divergences.items():
            beta = term.beta if isinstance(term, JsdTerm) else 0.5
            terms.append(OutputTerm(name, scales[name], term.temperature, beta))
        if self.gate is None:
            return [term for term in terms if term.scale]
        measured = [] if self.losses.cross_entropy else [OutputTerm("cross_entropy", 0.0, weighted=False)]
        return sorted([*terms, *measured], key=lambda term: term.scale == 0)

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term at a progress in [0, 1], the anchor's too."""
        weighed = Term | ParameterAnchorTerm | RouterBalanceTerm
        return {
            name: term.weight.at(progress) for name, term in self.losses if isinstance(term, weighed) and term.weight is not None
        }


def resolve(losses: Losses, cache: Cache, student: PreTrainedModel, tail_rank: int | None = None) -> Objective:
    """Make what computes the terms; of the cached tail, `tail_rank` directions are used. MismatchError naming the term and what the
    cache or the student lacks."""
    _check_tail_rank(losses, cache, tail_rank)
    check_cache(losses, cache)
    losses, balance = with_balance(losses, student)
    on = {name: getattr(losses, name) for name in STATE_TERMS}
    weigher = None
    if losses.importance is not None:
        _check_tags(losses, cache)
        weigher = Weigher.of(load_rules(losses.importance.rules), cache.manifest.tokenizer.vocab_size)
    states = {name: STATE_TERMS[name](term, cache, student) for name, term in on.items() if term is not None}
    return Objective(losses, states, weigher, _gate(losses, states, cache), balance)


def refusals(cache: Cache, student: PreTrainedModel) -> dict[str, str]:
    """By term that this cache or student cannot have, with its default settings: why."""
    found = {}
    for name in KIND_OF:
        settings = {"temperature": 1.0} if name in DIVERGENCES else {}  # the one that every cache serves
        losses = Losses.model_validate({name: settings})
        try:
            check_cache(losses, cache)
            if name in STATE_TERMS:
                STATE_TERMS[name](getattr(losses, name), cache, student)
        except SignalStoreError as error:
            found[name] = error.what + (f": expected {error.expected}" if error.expected else "")
    return found


def _gate(losses: Losses, states: Mapping[str, StateTerm], cache: Cache) -> Gate | None:
    if losses.gate is None:
        return None
    levels = [name for name, term in states.items() if isinstance(term, Level)]
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


def _check_tags(losses: Losses, cache: Cache) -> None:
    if "tags/roles" not in cache.capacity_rows:
        raise MismatchError(
            "importance needs the roles of words, which the cache does not hold",
            expected="tags/roles",
            found="none",
            where=cache.uri,
            remedy="Build a cache whose sources have a tagger, or switch importance off.",
        )
    if not losses.divergences:
        raise MismatchError("importance weighs the tokens of a divergence", expected="one", found="none", where="losses")


def _check_tail_rank(losses: Losses, cache: Cache, tail_rank: int | None) -> None:
    """A coarser tail is the user's wish, even none at all; a finer one than is cached cannot be."""
    held = cache.manifest.calibration.tail_rank
    if tail_rank is not None and (not losses.divergences or tail_rank > held):
        raise MismatchError(
            "tail_rank asks for what is not there", expected=f"a divergence, and at most {held}", found=tail_rank, where="tail_rank"
        )


def check_cache(losses: Losses, cache: Cache) -> None:
    """Refuse what the cache cannot serve."""
    signals = cache.manifest.signals
    wanted = dict.fromkeys(losses.divergences, "distribution") | SIGNALS
    for term, signal in wanted.items():
        if getattr(losses, term) is not None and getattr(signals, signal) is None:
            raise not_cached(term, f"signals.{signal}", cache)
    for name, divergence in losses.divergences.items():
        _check_temperature(name, divergence.temperature, cache)


def _check_temperature(term: str, wanted: float, cache: Cache) -> None:
    signal = cache.manifest.signals.distribution
    assert signal is not None
    if wanted not in signal.temperatures:
        raise MismatchError(
            f"{term}: the cache cannot serve this temperature",
            expected=f"one of {list(signal.temperatures)}",
            found=wanted,
            where=cache.uri,
            remedy="Train at one of them, or build a cache whose signals.distribution.temperatures hold it.",
        )
    mass = cache.manifest.calibration.coverage[signal.temperatures.index(wanted)]
    if cache.manifest.calibration.tail_rank == 0 and mass < MIN_HEAD_MASS:
        raise MismatchError(
            f"{term}: the cache has no tail and its head holds too little at this temperature",
            expected=f"a mean mass of {MIN_HEAD_MASS}",
            found=f"{mass:.3f}",
            where=cache.uri,
            remedy="Lower the temperature, or build a cache with a tail.",
        )
