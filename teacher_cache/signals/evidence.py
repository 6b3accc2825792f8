"""Which sentences of a question its answer looks at."""

from typing import Any

import numpy as np
import torch

from model_taps.evidence import evidence_shares
from model_taps.spread import evenly
from signal_store.errors import InputError
from signal_store.format.capacities import Capacities
from signal_store.manifest import Manifest
from signal_store.signals import EvidenceSignal
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.base import Facts, SampledExtractor, Scale
from teacher_cache.signals.extracted import Extracted, Rows, numpy_of
from teacher_cache.signals.layers import chosen_layers, refuse_no_rows
from teacher_cache.signals.unit_work import Places, SignalBatch, UnitWork
from teacher_cache.teacher.forward import TapRequest
from teacher_cache.teacher.load import Teacher


class EvidenceExtractor(SampledExtractor[EvidenceSignal, list[int]]):
    """One row a sentence."""

    document_key = "evidence_layers"
    trial = None

    def sentences(self, unit: UnitPlan) -> Places:
        """[n, 2]: sentences of segments that have at least two of them; shares of one alone say nothing."""
        segment = unit.segment_of_token[unit.sentences[:, 0]]
        return unit.sentences[np.bincount(segment, minlength=len(unit.length))[segment] > 1]

    def positions(self, unit: UnitPlan) -> Places:
        """First tokens of the sentences."""
        return self.sentences(unit)[:, 0]

    def queries(self, unit: UnitPlan) -> Places:
        """Ascending places of the answers' rows, evenly spread, of segments that have evidence."""
        has = np.unique(unit.segment_of_token[self.positions(unit)])
        counted = np.flatnonzero((unit.loss_mask > 0) & np.isin(unit.segment_of_token, has))
        rows_S = torch.from_numpy(unit.rows_per_segment(counted))
        spread = evenly(rows_S, self.section.queries)
        found: Places = counted[spread.index[spread.inside].numpy()]
        return found

    def attention_places(self, unit: UnitPlan) -> Places:
        """Rows of the answers."""
        return self.queries(unit)

    def planned(self) -> dict[str, Any]:
        """That there are sentences."""
        return {"evidence": True}

    def plan_rows(self, work: UnitWork, manifest: Manifest) -> Rows:
        """How long each sentence is."""
        sentences = work.once(self.sentences)
        return {**super().plan_rows(work, manifest), "evidence/rows/length": sentences[:, 1] - sentences[:, 0]}

    def refuse_empty(self, needs: Capacities) -> None:
        """Questions of two sentences there must be."""
        if not needs.evidence_rows:
            raise InputError(
                "the evidence signal has nothing to look at",
                expected="a source with task: qa whose prompts hold two sentences",
                found="none",
                where="signals.evidence",
            )

    @property
    def needs_attention(self) -> bool:
        """Always."""
        return True

    def decide(self, teacher: Teacher) -> Facts:
        """Those of the layers that have attention rows."""
        refuse_no_rows(teacher, "evidence")
        layers = chosen_layers(self.section.layers, self.section.depths, teacher)
        able = [layer for layer in layers if layer in teacher.row_layers]
        if not able:
            raise InputError("no softmax attention at these layers", expected=list(teacher.row_layers), where="signals.evidence")
        return able

    def taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """Rows of these layers."""
        return TapRequest(row_layers=tuple(facts))

    def extract(self, prepared: list[int], batch: SignalBatch) -> Extracted:
        """Rows of one per sentence of the batch's questions."""
        unit, sentences = batch.unit, batch.work.once(self.sentences)
        ranges, segments = sentences[batch.has(sentences[:, 0])], len(unit.length)
        asked = batch.captured(batch.work.once(self.queries))
        segment_R = torch.from_numpy(unit.segment_of_token[batch.outputs.row_places[asked]]).to(batch.device)
        segment_P = unit.segment_of_token[ranges[:, 0]]
        own = torch.from_numpy(ranges - unit.token_start[segment_P][:, None]).to(batch.device)
        kept, of = torch.from_numpy(asked).to(batch.device), torch.from_numpy(segment_P).to(batch.device)
        rows: dict[str, Any] = {}
        for layer in prepared:
            shares = evidence_shares(batch.outputs.rows[layer][kept], segment_R, own, of, segments)
            rows[f"evidence/{layer}/share"] = numpy_of(shares.half(), "float16")
        return Extracted(rows)

    def bytes_per_token(self, scale: Scale) -> tuple[float, float]:
        """Where a sentence is, how long, and its shares."""
        shares = (12 + 2 * len(self.section.layers or self.section.depths)) * scale.per_token("evidence_rows")
        return 0.2 * shares, 1.1 * shares
