"""From a recipe's terms to what they need: refused at start where the cache does not hold it, never at step 1000."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from model_taps.attention import softmax_attention_layers
from model_taps.blocks import layer_at_depth, num_layers
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.losses.chunked import OutputTerm
from student_train.losses.config import ApcTerm, AsrTerm, CrossEntropyTerm, DivergenceTerm, JsdTerm, LhsmTerm, Losses
from student_train.losses.schedule import Weight
from student_train.stream.reader import Needs

MIN_HEAD_MASS = 0.9
"""Least mean mass of the head at which a cache without a tail serves a temperature."""

Term = CrossEntropyTerm | DivergenceTerm | LhsmTerm | ApcTerm | AsrTerm


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A teacher's layer in the cache and the student's layer at the same depth."""

    teacher: int
    student: int


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms that are on, and where they read: pairs of layers for LHSM and APC, what of the cache is streamed."""

    losses: Losses
    hidden_pairs: tuple[LayerPair, ...]
    attention_pairs: tuple[LayerPair, ...]

    @property
    def terms(self) -> dict[str, Term]:
        """Terms that are on, by name."""
        return {name: term for name, term in self.losses if term is not None}

    @property
    def needs(self) -> Needs:
        """What is read of the cache besides tokens."""
        return Needs(
            distribution=bool(self.losses.divergences),
            hidden=tuple(("block_output", pair.teacher) for pair in self.hidden_pairs),
            attention=tuple(pair.teacher for pair in self.attention_pairs),
        )

    def output_terms(self, scales: Mapping[str, float]) -> list[OutputTerm]:
        """The terms of the pass over the output head that weigh something, by name in `kind`."""
        terms = [OutputTerm("cross_entropy", scales["cross_entropy"])] if self.losses.cross_entropy else []
        for name, term in self.losses.divergences.items():
            beta = term.beta if isinstance(term, JsdTerm) else 0.5
            terms.append(OutputTerm(name, scales[name], term.temperature, beta))
        return [term for term in terms if term.scale]

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term at a progress in [0, 1]."""
        schedule: dict[str, Weight] = {name: term.weight for name, term in self.terms.items()}
        return {name: weight.at(progress) for name, weight in schedule.items()}


def resolve(losses: Losses, cache: Cache, student: PreTrainedModel, tail_rank: int | None = None) -> Objective:
    """Pair layers by depth; of the cached tail, `tail_rank` directions are used. MismatchError naming the term and what the cache
    lacks."""
    _check_tail_rank(losses, cache, tail_rank)
    check_cache(losses, cache)
    calibration, depth = cache.manifest.calibration, cache.manifest.teacher.num_layers
    own = num_layers(student)
    outputs = [h.layer for h in calibration.hidden if h.tap == "block_output"] if losses.lhsm else []
    if losses.lhsm is not None and not outputs:
        raise MismatchError(
            "lhsm: the cache holds no block outputs",
            expected="signals.hidden.taps with block_output",
            found=sorted({h.tap for h in calibration.hidden}),
            where=cache.uri,
        )
    hidden = tuple(LayerPair(layer, layer_at_depth(layer / depth, own)) for layer in outputs)
    attention: tuple[LayerPair, ...] = ()
    if losses.apc is not None:
        able = softmax_attention_layers(student)
        if not able:
            raise MismatchError("apc: the student has no softmax attention", expected="a block that has", where="student")
        wanted = [(a.layer, layer_at_depth(a.layer / depth, own)) for a in calibration.attention]
        attention = tuple(LayerPair(t, max((x for x in able if x <= s), default=able[0])) for t, s in wanted)
    return Objective(losses, hidden, attention)


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
    held = [name for name, signal in signals if signal is not None]
    wanted = dict.fromkeys(losses.divergences, "distribution") | {"lhsm": "hidden", "apc": "attention"}
    for term, signal in wanted.items():
        if getattr(losses, term) is not None and getattr(signals, signal) is None:
            raise MismatchError(
                f"{term} needs a signal that the cache does not hold",
                expected=signal,
                found=", ".join(held) or "none",
                where=cache.uri,
                remedy=f"Build a cache with signals.{signal}, or switch {term} off.",
            )
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
