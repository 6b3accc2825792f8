"""Small statistics of each segment: of attention rows, FFN activations and gradients."""

from typing import Any, ClassVar

import numpy as np
import torch

from model_taps.attention_statistics import STATISTICS_EVERY, attention_statistics
from model_taps.segment_statistics import ffn_statistics, gradient_statistics
from signal_store.manifest import Manifest
from signal_store.signals import StatsLayout, StatsSignal
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.base import Arrays, Facts, Scale, SignalExtractor, Trial
from teacher_cache.signals.extracted import Extracted, numpy_of
from teacher_cache.signals.layers import chosen_layers, refuse_no_rows
from teacher_cache.signals.unit_work import Places, SignalBatch
from teacher_cache.teacher.forward import NO_PLACES, TapRequest
from teacher_cache.teacher.load import Teacher


class StatsExtractor(SignalExtractor[StatsSignal, StatsLayout]):
    """One row a segment."""

    document_key = "stats"
    trial: ClassVar[Trial] = {"gradient": True}

    def attention_places(self, unit: UnitPlan) -> Places:
        """Rows that attention statistics are taken from; never a segment's first, which sees itself only."""
        if not self.section.attention:
            return NO_PLACES
        return np.flatnonzero((unit.place_in_segment % STATISTICS_EVERY == STATISTICS_EVERY - 1) & ~unit.is_context)

    @property
    def needs_head(self) -> bool:
        """For the gradient of the loss."""
        return self.section.gradient

    @property
    def needs_attention(self) -> bool:
        """Where attention statistics are wanted."""
        return self.section.attention

    def decide(self, teacher: Teacher) -> Facts:
        """The layers, and those of them with attention rows."""
        layers = chosen_layers(self.section.layers, self.section.depths, teacher)
        if self.section.attention:
            refuse_no_rows(teacher, "stats", "; stats can do without, attention: false")
        rows, heads = tuple(layer for layer in layers if layer in teacher.row_layers), teacher.identity.num_heads or 0
        return StatsLayout(layers=layers, attention_layers=rows, num_heads=heads).model_dump(mode="json")

    def taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """As the section says, at the layers."""
        layout = StatsLayout.model_validate(facts)
        return TapRequest(
            states=tuple(("ffn_activation", layer) for layer in layout.layers) if self.section.ffn else (),
            row_layers=layout.attention_layers if self.section.attention else (),
            gradient_layers=layout.layers if self.section.gradient else (),
        )

    def prepare(self, facts: Facts, manifest: Manifest, arrays: Arrays, teacher: Teacher) -> StatsLayout:
        """The layers."""
        return StatsLayout.model_validate(facts)

    def extract(self, prepared: StatsLayout, batch: SignalBatch) -> Extracted:
        """Rows that are context only count nowhere."""
        outputs, segments = batch.outputs, batch.num_segments
        segment_n = torch.from_numpy(batch.segment_of_token).to(batch.device)
        own = torch.from_numpy(np.flatnonzero(~batch.is_context)).to(batch.device)
        rows: dict[str, Any] = {}
        if self.section.attention:
            kept = torch.from_numpy(batch.captured(batch.work.once(self.attention_places))).to(batch.device)
            segment_R = segment_n[torch.from_numpy(outputs.row_places - outputs.tokens.start).to(batch.device)][kept]
            for layer in prepared.attention_layers:
                found = attention_statistics(outputs.rows[layer][kept], outputs.row_lengths[kept], segment_R, segments)
                rows[f"stats/attention/{layer}/values"] = numpy_of(found.half(), "float16")
        if self.section.ffn:
            per_layer = [
                ffn_statistics(outputs.states["ffn_activation", n][own], segment_n[own], segments) for n in prepared.layers
            ]
            rows["stats/ffn/values"] = numpy_of(torch.stack(per_layer, 1).half(), "float16")
        if self.section.gradient:
            variances = [gradient_statistics(outputs.gradients[n][own], segment_n[own], segments) for n in prepared.layers]
            rows["stats/gradient/log10_variance"] = numpy_of(torch.stack(variances, 1).half(), "float16")
        return Extracted(rows)

    def bytes_per_token(self, scale: Scale) -> tuple[float, float]:
        """At most those of every layer."""
        per_segment = scale.per_token("segments") * scale.config.num_hidden_layers
        return 0.0, per_segment * (8 * (getattr(scale.config, "num_attention_heads", None) or 0) + 6)
