"""Sparsity of the student's FFN activations: the mean or the sum over units of |a|, which needs no teacher; or `relative`, how far
a segment's Hoyer sparsity (Hoyer 2004) stays below the teacher's at the same depth: as sparing as it, not more.
"""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.blocks import layer_at_depth, mean_abs_activation, num_layers
from model_taps.segment_statistics import ffn_statistics
from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.signals.stats import FFN_STATISTICS
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.stats import StatsPart, StatsRequest
from student_train.losses.kinds import Kind
from student_train.losses.row_queries import own_tokens, segment_of_token
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import Reads, StateLoss, StateTerm, StudentOutputs, TermSection, not_cached

HOYER = FFN_STATISTICS.index("hoyer_sparsity")


class AsrSection(TermSection):
    """Activation sparsity: |a| of the FFN's activations, mean over tokens, units and blocks; or their sum over units; or,
    `relative`, what a segment's Hoyer sparsity lacks to the teacher's, mean over segments and layers."""

    weight: WeightField = constant(1e-3)
    reduction: Literal["mean", "sum"] = "mean"
    relative: bool = False


def make_asr(section: AsrSection, cache: Cache, student: PreTrainedModel) -> StateLoss:
    """The one or the other."""
    return RelativeAsr(section, cache, student) if section.relative else Asr(section, student)


class Asr(StateLoss):
    """|a| of all blocks."""

    def __init__(self, section: AsrSection, student: PreTrainedModel) -> None:
        super().__init__()
        self.sums = section.reduction == "sum"
        self.reads = Reads(states=tuple(("ffn_activation", layer) for layer in range(1, num_layers(student) + 1)))

    def count(self, batch: CodedBatch) -> int:
        """Tokens."""
        return int(batch.real.sum())

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Mean over blocks."""
        activations = [outputs.states[state] for state in self.reads.states]
        units = activations[0].shape[-1] if self.sums else 1
        return mean_abs_activation(activations, outputs.batch.real) * outputs.batch.real.sum() * units


class RelativeAsr(StateLoss):
    """max(0, H_T - H_S), H Hoyer's sparsity of a segment."""

    def __init__(self, _section: AsrSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        signal, layout = cache.manifest.signals.stats, cache.manifest.calibration.stats
        if signal is None or layout is None or not signal.ffn:
            raise not_cached("asr: relative", "signals.stats with ffn: true", cache, "set losses.asr.relative: false")
        depth, own = cache.manifest.teacher.num_layers, num_layers(student)
        self.states: tuple[State, ...] = tuple(("ffn_activation", layer_at_depth(layer / depth, own)) for layer in layout.layers)
        self.reads = Reads(SignalRequest.of(StatsRequest(ffn=True)), tuple(dict.fromkeys(self.states)))

    def count(self, batch: CodedBatch) -> int:
        """Segments."""
        return 0 if batch.part(StatsPart) is None else len(batch.segments)

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Mean over the teacher's layers."""
        batch, stats = outputs.batch, outputs.batch.part(StatsPart)
        activations = [outputs.states[state].flatten(0, -2) for state in self.states]
        if stats is None or stats.ffn is None or not len(batch.segments):
            return 0 * torch.stack([a.sum() for a in activations]).sum()
        own = own_tokens(batch).flatten()
        segment_n, segments = segment_of_token(batch).flatten()[own], len(batch.segments)
        mine_SL = torch.stack([ffn_statistics(a[own], segment_n, segments)[:, HOYER] for a in activations], 1)
        below_SL = (stats.ffn[..., HOYER].float() - mine_SL).clamp(min=0)
        return below_SL.nan_to_num().mean(1).sum()


TERM = StateTerm(section=AsrSection, kind=Kind.IMPLICIT, module=make_asr, residue=None, across=True)
