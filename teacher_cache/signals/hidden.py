"""Hidden states at the sampled tokens: each tap of each layer, coded by what calibration fits of it."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from model_taps.slices import State
from signal_store.codecs.hidden import HiddenCodec
from signal_store.errors import InputError
from signal_store.format.capacities import Capacities
from signal_store.manifest import Manifest
from signal_store.signals import EveryNth, HiddenLayout, HiddenSignal, RandomFraction, Stratified
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.base import Arrays, CalibrationSample, Facts, SampledExtractor, Scale, Trial
from teacher_cache.signals.coded_states import coded_states
from teacher_cache.signals.extracted import Extracted, Rows
from teacher_cache.signals.layers import chosen_layers
from teacher_cache.signals.sampling import drawn, key_of, per_segment
from teacher_cache.signals.unit_work import Places, SignalBatch, UnitWork
from teacher_cache.teacher.forward import TapRequest
from teacher_cache.teacher.load import Teacher

MASSIVE = 8.0
"""Under PCA, a channel is divided down to this many times the median channel's spread if it exceeds that."""


class HiddenExtractor(SampledExtractor[HiddenSignal, list[tuple[HiddenLayout, HiddenCodec]]]):
    """States by tap and layer."""

    document_key = "hidden"
    trial: ClassVar[Trial] = {"taps": ["block_input", "block_output"]}

    def positions(self, unit: UnitPlan) -> Places:
        """As the section says; of random ones each segment has its share."""
        positions = self.section.positions
        if positions == "all":
            return np.flatnonzero(~unit.is_context)
        if positions == "keywords":
            return unit.keyword
        if isinstance(positions, EveryNth):
            return np.flatnonzero((unit.place_in_segment % positions.every == 0) & ~unit.is_context)
        if isinstance(positions, RandomFraction):
            share, seed = positions.fraction, positions.seed
            return per_segment(unit, lambda s, own: drawn(own, round(share * len(own)), key_of(unit, s, seed)))
        return _stratified(unit, positions)

    def planned(self) -> dict[str, Any]:
        """Which tokens."""
        return {"hidden_positions": self.section.model_dump(mode="json")["positions"]}

    def plan_rows(self, work: UnitWork, manifest: Manifest) -> Rows:
        """None where every token has a row."""
        return {} if self.section.positions == "all" else super().plan_rows(work, manifest)

    def refuse_empty(self, needs: Capacities) -> None:
        """Keywords there must be, where it is taken at keywords."""
        if self.section.positions == "keywords" and needs.hidden_rows <= 1:
            raise InputError(
                "no keyword was found for the hidden signal's positions",
                expected="a source whose keywords are found, and some in its text",
                found="none",
                remedy="Give sources a lexer (prose: a tagger with keywords: true), or take other positions.",
            )

    @property
    def one_row_per_token(self) -> bool:
        """Where it is taken everywhere."""
        return self.section.positions == "all"

    def decide(self, teacher: Teacher) -> Facts:
        """Taps and layers."""
        layers = chosen_layers(self.section.layers, self.section.depths, teacher)
        return [{"tap": tap, "layer": layer} for tap in self.section.taps for layer in layers]

    def taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """The states."""
        return TapRequest(states=_states(facts))

    def calibration_taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """The same."""
        return self.taps(facts, teacher)

    def collect(self, facts: Facts, batch: SignalBatch) -> dict[State, Tensor]:
        """float32 [n, d] of each state."""
        own = torch.from_numpy(~batch.is_context)
        return {state: batch.outputs.states[state].float().cpu()[own] for state in _states(facts)}

    def fit(self, facts: Facts, collected: Sequence[Any], sample: CalibrationSample) -> tuple[Facts, Arrays]:
        """A codec for each state, on all of the sample."""
        arrays: dict[str, Any] = {}
        whole = []
        for tap, layer in _states(facts):
            codec, explained = fit_hidden(torch.cat([segment[tap, layer] for segment in collected]), self.section.rank)
            rank = None if codec.basis is None else codec.basis.shape[1]
            layout = HiddenLayout(tap=tap, layer=layer, width=len(codec.mean), rank=rank, explained_variance=explained)
            arrays |= codec.to_arrays(layout.group)
            whole.append(layout.model_dump(mode="json"))
        return whole, arrays

    def prepare(self, facts: Facts, manifest: Manifest, arrays: Arrays, teacher: Teacher) -> list[tuple[HiddenLayout, HiddenCodec]]:
        """Layout and codec of each state."""
        layouts = [HiddenLayout.model_validate(fact) for fact in facts]
        return [(h, HiddenCodec.from_arrays(arrays, h.group, self.section.value_bits).to(teacher.device)) for h in layouts]

    def extract(self, prepared: list[tuple[HiddenLayout, HiddenCodec]], batch: SignalBatch) -> Extracted:
        """Values and scales."""
        rows = slice(None) if self.one_row_per_token else batch.rows_of(batch.work.once(self.positions))
        return Extracted.joined(
            [coded_states(codec, layout.group, batch.outputs.states[layout.tap, layout.layer][rows]) for layout, codec in prepared]
        )

    def bytes_per_token(self, scale: Scale) -> tuple[float, float]:
        """Codes of noise take all of their bytes, those of few directions less."""
        groups = len(self.section.taps) * len(self.section.layers or self.section.depths)
        row = groups * ((self.section.rank or scale.config.hidden_size) * (self.section.value_bits // 8) + 4)
        return 0.4 * row * scale.per_token("hidden_rows"), 1.05 * row * scale.per_token("hidden_rows")


def _states(facts: Facts) -> tuple[State, ...]:
    return tuple((fact["tap"], fact["layer"]) for fact in facts)


def _stratified(unit: UnitPlan, positions: Stratified) -> Places:
    keyword = np.zeros(unit.num_tokens, dtype=bool)
    keyword[unit.keyword] = True

    def chosen(segment: int, own: Places) -> Places:
        rest = own[~keyword[own]]
        wanted = max(0, round(positions.stratified * len(own)) - int(keyword[own].sum()))
        return np.union1d(own[keyword[own]], drawn(rest, wanted, key_of(unit, segment, positions.seed)))

    return per_segment(unit, chosen)


def fit_hidden(states_ND: Tensor, rank: int | None) -> tuple[HiddenCodec, float]:
    """The codec, and the share of variance it keeps (of the channels as it divides them)."""
    mean = states_ND.double().mean(0)
    centred = states_ND.double() - mean
    spread = centred.square().mean(0).sqrt().clamp(min=1e-6)
    if rank is not None and rank > states_ND.shape[1]:
        raise InputError(
            "more directions than the state has", expected=f"at most {states_ND.shape[1]}", found=rank, where="signals.hidden.rank"
        )
    if rank is None or rank == states_ND.shape[1]:
        return HiddenCodec(mean.float(), spread.float(), None), 1.0
    divisor = (spread / (MASSIVE * spread.median())).clamp(min=1)
    centred /= divisor
    energy, directions = torch.linalg.eigh(centred.T @ centred)
    kept = directions[:, energy.argsort(descending=True)[:rank]]
    share = float(energy.sort(descending=True).values[:rank].sum() / energy.sum().clamp(min=1e-30))
    return HiddenCodec(mean.float(), divisor.float(), kept.float()), share
