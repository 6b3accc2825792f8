"""Smooth paths: how far the last state moves from token to token, the later in the response the less.

(t / t_ref) · ‖h_t - h_{t-1}‖² over the variance of the segment's states about their mean: divided by ‖h‖² it would be gamed by a
constant offset. `relative`: only what exceeds the teacher's own, of the deepest cached layer; standing still then earns nothing.
"""

import torch
from pydantic import Field
from transformers import PreTrainedModel

from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.hidden import HiddenPart, HiddenRequest
from student_train.losses.features import teacher_states
from student_train.losses.kinds import Kind
from student_train.losses.pairing import LayerPair, state_pairs
from student_train.losses.schedule import WeightField, constant
from student_train.losses.temporal import TemporalLoss, TokenLosses
from student_train.losses.term import Reads, StateTerm, StudentOutputs, TermSection, at_least_float32
from student_train.losses.trajectory import moved, places_of


class SmoothnessSection(TermSection):
    """(t / t_ref) · ‖h_t - h_{t-1}‖² over the segment's variance of h, t counted along the tokens of the segment that count;
    `relative`: only what exceeds the teacher's; mean over tokens that count."""

    weight: WeightField = constant(0.05)
    reference_tokens: int = Field(256, ge=1)
    relative: bool = True


class Smoothness(TemporalLoss):
    """The last state's steps; beyond the teacher's, those of its deepest cached layer."""

    def __init__(self, section: SmoothnessSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        self.section = section
        self.pair: LayerPair | None = None
        self.reads = Reads()
        if section.relative:
            signal = cache.manifest.signals.hidden
            self.pair = state_pairs("smoothness", "block_output", cache, student)[-1]
            if signal is None or signal.positions != "all":
                raise MismatchError(
                    "smoothness: the teacher's path is not whole in the cache",
                    expected="signals.hidden.positions: all",
                    found=None if signal is None else signal.positions,
                    where=cache.uri,
                    remedy="Set losses.smoothness.relative: false, or build a cache with all positions.",
                )
            needs = SignalRequest.of(HiddenRequest((("block_output", self.pair.teacher),)))
            self.reads = Reads(needs, (("block_output", self.pair.student),))

    def count(self, batch: CodedBatch) -> int:
        """Tokens that count."""
        return len(batch.flat)

    def per_token(self, outputs: StudentOutputs) -> TokenLosses:
        """A token whose predecessor does not count adds nothing."""
        batch = outputs.batch
        segment_N, place_N, follows_N = places_of(batch)
        segments = len(batch.segment_rows)
        if self.pair is None:
            excess_N = moved(at_least_float32(outputs.final[batch.flat]), segment_N, segments, follows_N)
        else:
            own = at_least_float32(outputs.states["block_output", self.pair.student].flatten(0, 1)[batch.flat])
            flat = HiddenPart.of(batch).flat
            index = flat.new_zeros(batch.input_ids.numel())
            index[flat] = torch.arange(len(flat), device=index.device)
            other = teacher_states(outputs, ("block_output", self.pair.teacher))[index[batch.flat]]
            both = (moved(states, segment_N, segments, follows_N) for states in (own, other))
            mine_N, theirs_N = both
            excess_N = (mine_N - theirs_N).clamp(min=0)
        return TokenLosses(batch.flat, excess_N * place_N / self.section.reference_tokens)


TERM = StateTerm(section=SmoothnessSection, kind=Kind.TEMPORAL, module=Smoothness, residue=1e-4)
