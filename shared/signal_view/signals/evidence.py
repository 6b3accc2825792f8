"""Which sentences of a question its answer looks at."""

from typing import Any

import numpy as np

from signal_view.extras import pandas
from signal_view.segment_rows import sampled_places, sampled_rows
from signal_view.segment_text import SegmentText
from signal_view.signals.base import SignalView, dataset_of

UNITS = {"start": "token", "length": "token", "text": "text"}


class EvidenceView(SignalView):
    """A row a sentence."""

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """See the base."""
        frame = evidence(segment).rename_axis("row")
        return {"/evidence": dataset_of(frame, lambda column: UNITS.get(column, "share"), "evidence")}


def evidence(segment: SegmentText) -> Any:
    """DataFrame of a question's sentences: `start` and `length` in tokens, `text`, and by layer the `share` of the answer's
    attention, which adds up to 1."""
    cache = segment.cache
    rows = sampled_rows(segment, "evidence")
    start, pieces = sampled_places(segment, "evidence", rows), segment.tokens
    length = cache.read("evidence/rows/length", rows.start, rows.stop).astype(np.int64)
    found: dict[str, Any] = {
        "start": start,
        "length": length,
        "text": ["".join(pieces[a : a + n]) for a, n in zip(start, length, strict=True)],
    }
    for layer in cache.manifest.calibration.evidence_layers:
        found[f"share_{layer}"] = cache.read(f"evidence/{layer}/share", rows.start, rows.stop).astype(np.float32)
    return pandas().DataFrame(found)
