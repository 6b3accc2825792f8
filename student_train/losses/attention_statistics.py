"""How attention is spread, whatever the number of heads: the deciles over heads of four statistics of a row.

Entropy over log length, mean look-back, largest mass, mass on the first token: means over every 16th row of a segment, by head; the
cache holds the teacher's. L = mean |Q_T(q) - Q_S(q)| over q = 0.1 ... 0.9, statistics, layers and segments.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.attention_statistics import attention_statistics
from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.stats import StatsPart, StatsRequest
from student_train.losses.kinds import Kind
from student_train.losses.pairing import row_pairs
from student_train.losses.row_queries import RowsOf, segment_of_query, statistics_rows
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import Reads, StateLoss, StateTerm, StudentOutputs, TermSection, not_cached

DECILES = tuple(n / 10 for n in range(1, 10))


class AttentionStatisticsSection(TermSection):
    """|Q_T - Q_S| over the deciles of the heads' entropy, look-back, largest mass and mass on the first token; mean over segments
    and layers."""

    weight: WeightField = constant(0.2)


class AttentionStatistics(StateLoss):
    """Deciles over heads, so that any numbers of heads compare."""

    def __init__(self, _section: AttentionStatisticsSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        layout, signal = cache.manifest.calibration.stats, cache.manifest.signals.stats
        if layout is None or signal is None or not signal.attention:
            raise not_cached("attention_statistics", "signals.stats with attention: true", cache)
        self.pairs = row_pairs("attention_statistics", layout.attention_layers, cache, student)
        rows: dict[RowsOf, tuple[int, ...]] = {statistics_rows: tuple(dict.fromkeys(p.student for p in self.pairs))}
        self.reads = Reads(SignalRequest.of(StatsRequest(layout.attention_layers)), rows=rows)

    def count(self, batch: CodedBatch) -> int:
        """Segments that have statistics."""
        return int(_known(batch, self.pairs[0].teacher).sum())

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Mean over layers."""
        batch, stats = outputs.batch, outputs.batch.part(StatsPart)
        query = outputs.queries[statistics_rows]
        segment_R = segment_of_query(batch, query)
        known = _known(batch, self.pairs[0].teacher)
        levels = torch.tensor(DECILES, device=outputs.final.device)
        parts = []
        for pair in self.pairs:
            rows = outputs.rows[statistics_rows, pair.student]
            own = attention_statistics(rows, query.lengths, segment_R, len(batch.segments))[known]
            other = own.detach() if stats is None else stats.attention[pair.teacher].float()[known]
            apart = own.quantile(levels, dim=1) - other.quantile(levels, dim=1) if len(own) else rows[:0]
            parts.append(apart.abs().mean((0, 2)).sum() if len(own) else 0 * rows.sum())
        return torch.stack(parts).mean()


def _known(batch: CodedBatch, layer: int) -> Tensor:
    """bool [segments]: which have a row to take statistics from."""
    stats = batch.part(StatsPart)
    return torch.zeros(0, dtype=torch.bool) if stats is None else ~stats.attention[layer][:, 0, 0].isnan()


TERM = StateTerm(section=AttentionStatisticsSection, kind=Kind.IMPLICIT, module=AttentionStatistics, residue=2e-3)
