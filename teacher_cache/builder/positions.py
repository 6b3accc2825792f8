"""Which tokens of a unit each signal is taken at: fixed by the plan's tokens and the recipe, before the teacher runs.

Places count from the unit's first token. Rows that are there as context only hold no signal. What is random is keyed by seed and
by the segment's own tokens, so that it is the same wherever the segment lies.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model_taps.attention_statistics import STATISTICS_EVERY
from model_taps.spread import evenly
from signal_store.format.manifest import Capacities
from signal_store.signals import EveryNth, Positions, RandomFraction, ReplaySignal, Signals, Stratified
from teacher_cache.corpus.unit_plan import UnitPlan

Places = NDArray[np.int64]


def hidden_positions(unit: UnitPlan, positions: Positions) -> Places:
    """Ascending places of the stored hidden states."""
    if positions == "all":
        return np.flatnonzero(~unit.is_context)
    if positions == "keywords":
        return unit.keyword
    if isinstance(positions, EveryNth):
        return np.flatnonzero((unit.place_in_segment % positions.every == 0) & ~unit.is_context)
    if isinstance(positions, RandomFraction):
        return _per_segment(unit, lambda s, own: _drawn(own, round(positions.fraction * len(own)), _key(unit, s, positions.seed)))
    assert isinstance(positions, Stratified)
    keyword = np.zeros(unit.num_tokens, dtype=bool)
    keyword[unit.keyword] = True

    def stratified(segment: int, own: Places) -> Places:
        rest = own[~keyword[own]]
        wanted = max(0, round(positions.stratified * len(own)) - int(keyword[own].sum()))
        return np.union1d(own[keyword[own]], _drawn(rest, wanted, _key(unit, segment, positions.seed)))

    return _per_segment(unit, stratified)


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Ascending `position` of each stored row, whether it is a `keyword`'s own, and its stored entries' `length`."""

    position: Places
    keyword: NDArray[np.bool_]
    length: Places


def attention_rows(unit: UnitPlan, previous_steps: int, max_columns: int | None) -> AttentionRows:
    """Keyword rows and the rows of the tokens before them, within their segment; a row has keys from its segment's start to
    itself, or the heaviest of them."""
    segment = unit.segment_of_token
    wanted = [unit.keyword]
    for back in range(1, previous_steps + 1):
        before = unit.keyword - back
        inside = before >= unit.token_start[segment[unit.keyword]] + unit.context_only[segment[unit.keyword]]
        wanted.append(before[inside])
    position = np.unique(np.concatenate(wanted))
    length = position - unit.token_start[segment[position]] + 1
    return AttentionRows(
        position, np.isin(position, unit.keyword), length if max_columns is None else np.minimum(length, max_columns)
    )


def statistics_positions(unit: UnitPlan) -> Places:
    """Places of the rows that attention statistics are taken from; never a segment's first, which sees itself only."""
    return np.flatnonzero((unit.place_in_segment % STATISTICS_EVERY == STATISTICS_EVERY - 1) & ~unit.is_context)


def replay_positions(unit: UnitPlan, signal: ReplaySignal) -> Places:
    """Rows whose label counts, of segments that end their document as the model would have."""

    def chosen(segment: int, own: Places) -> Places:
        seed, text = _key(unit, segment, signal.seed)
        sampled = unit.finished[segment] and _generator((seed, text ^ 1)).random() < signal.share
        eligible = own[unit.loss_mask[own] == 1] if sampled else own[:0]
        return _drawn(eligible, signal.positions_per_segment, (seed, text))

    return _per_segment(unit, chosen)


def evidence_sentences(unit: UnitPlan) -> Places:
    """[n, 2]: sentences of segments that have at least two of them; shares of one alone say nothing."""
    segment = unit.segment_of_token[unit.sentences[:, 0]]
    return unit.sentences[np.bincount(segment, minlength=len(unit.length))[segment] > 1]


def evidence_queries(unit: UnitPlan, queries: int) -> Places:
    """Ascending places of the answers' rows, evenly spread, of segments that have evidence."""
    has = np.unique(unit.segment_of_token[evidence_sentences(unit)[:, 0]])
    counted = np.flatnonzero((unit.loss_mask > 0) & np.isin(unit.segment_of_token, has))
    rows_S = torch.from_numpy(unit.rows_per_segment(counted))
    spread = evenly(rows_S, queries)
    found: Places = counted[spread.index[spread.inside].numpy()]
    return found


def coverage_words(unit: UnitPlan, words: int) -> Places:
    """[n, 2] place and token of the key words, the first so many of each segment."""
    segment = unit.segment_of_token[unit.key_words[:, 0]]
    counts = np.bincount(segment, minlength=len(unit.length))
    rank = np.arange(len(segment)) - (np.cumsum(counts) - counts)[segment]
    return unit.key_words[rank < words]


def capacities_of(unit: UnitPlan, signals: Signals, max_columns: int | None) -> Capacities:
    """Rows this unit needs."""
    attention = attention_rows(unit, signals.attention.previous_steps, max_columns) if signals.attention else None
    return Capacities(
        segments=len(unit.length),
        hidden_rows=len(hidden_positions(unit, signals.hidden.positions)) if signals.hidden else 0,
        attention_rows=len(attention.position) if attention else 0,
        attention_entries=int(attention.length.sum()) if attention else 0,
        replay_rows=len(replay_positions(unit, signals.replay)) if signals.replay else 0,
        evidence_rows=len(evidence_sentences(unit)) if signals.evidence else 0,
        coverage_rows=len(coverage_words(unit, signals.coverage.words)) if signals.coverage else 0,
    )


def _per_segment(unit: UnitPlan, choose: Callable[[int, Places], Places]) -> Places:
    parts = []
    for segment, (start, length) in enumerate(zip(unit.token_start, unit.length, strict=True)):
        parts.append(choose(segment, np.arange(start + unit.context_only[segment], start + length)))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _key(unit: UnitPlan, segment: int, seed: int) -> tuple[int, int]:
    return seed, int(unit.token_hash[segment])


def _drawn(places: Places, count: int, key: tuple[int, int]) -> Places:
    """`count` of the places without replacement, ascending."""
    return np.sort(_generator(key).permutation(places)[:count])


def _generator(key: tuple[int, int]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.asarray(key, dtype=np.uint64)))
