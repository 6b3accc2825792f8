"""Which key words of a text its summary says."""

from typing import Any

import numpy as np
import torch

from model_taps.coverage import summary_coverage
from signal_store.errors import InputError
from signal_store.format.capacities import Capacities
from signal_store.manifest import Manifest
from signal_store.signals import CoverageSignal
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.base import SampledExtractor, Scale
from teacher_cache.signals.extracted import Extracted, Rows, numpy_of
from teacher_cache.signals.unit_work import Places, SignalBatch, UnitWork


class CoverageExtractor(SampledExtractor[CoverageSignal, None]):
    """One row a key word."""

    trial = None

    def words(self, unit: UnitPlan) -> Places:
        """[n, 2] place and token of the key words, the first so many of each segment."""
        segment = unit.segment_of_token[unit.key_words[:, 0]]
        counts = np.bincount(segment, minlength=len(unit.length))
        rank = np.arange(len(segment)) - (np.cumsum(counts) - counts)[segment]
        return unit.key_words[rank < self.section.words]

    def positions(self, unit: UnitPlan) -> Places:
        """Where the key words first stand."""
        return self.words(unit)[:, 0]

    def planned(self) -> dict[str, Any]:
        """How many words."""
        return {"coverage_words": self.section.words}

    def plan_rows(self, work: UnitWork, manifest: Manifest) -> Rows:
        """Each word's first token."""
        return {**super().plan_rows(work, manifest), "coverage/rows/token": work.once(self.words)[:, 1]}

    def refuse_empty(self, needs: Capacities) -> None:
        """Key words there must be."""
        if not needs.coverage_rows:
            raise InputError(
                "the coverage signal has nothing to look at",
                expected="a source with task: summary whose prompts hold nouns or names",
                found="none",
                where="signals.coverage",
            )

    @torch.inference_mode()
    def extract(self, prepared: None, batch: SignalBatch) -> Extracted:
        """Rows of one per key word of the batch's texts."""
        tokens, words = batch.tokens, batch.work.once(self.words)
        words = words[batch.has(words[:, 0])]
        if not len(words):
            return Extracted({"coverage/words/probability": np.zeros(0, np.float16)})
        counted, segment = np.flatnonzero(batch.unit.loss_mask[tokens] > 0), batch.segment_of_token
        rows_N, segment_N, tokens_W, segment_W = (
            torch.from_numpy(np.ascontiguousarray(part)).to(batch.device)
            for part in (counted, segment[counted], words[:, 1], segment[words[:, 0] - tokens.start])
        )
        found = summary_coverage(batch.logits, rows_N, segment_N, tokens_W, segment_W, batch.num_segments)
        return Extracted({"coverage/words/probability": numpy_of(found.half(), "float16")})

    def bytes_per_token(self, scale: Scale) -> tuple[float, float]:
        """Where a word is, which, and its probability."""
        words = 14 * scale.per_token("coverage_rows")
        return 0.2 * words, 1.1 * words
