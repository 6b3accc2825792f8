"""Which key words of a text its summary says."""

from typing import Any

import numpy as np

from signal_view.extras import pandas
from signal_view.segment_rows import sampled_places, sampled_rows
from signal_view.segment_text import SegmentText
from signal_view.signals.base import SignalView, dataset_of
from signal_view.tokens import token_texts

UNITS = {"place": "token", "piece": "text", "probability": "probability"}


class CoverageView(SignalView):
    """A row a key word."""

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """See the base."""
        return {"/coverage": dataset_of(coverage(segment).rename_axis("row"), UNITS.__getitem__, "coverage")}


def coverage(segment: SegmentText) -> Any:
    """DataFrame of a text's key words: `place` where it first stands, `piece` of its first token, `probability` that the summary
    says it."""
    cache, texts = segment.cache, token_texts(segment.cache)
    rows = sampled_rows(segment, "coverage")
    tokens = cache.read("coverage/rows/token", rows.start, rows.stop)
    found = {
        "place": sampled_places(segment, "coverage", rows),
        "piece": [texts.piece(int(token)) for token in tokens],
        "probability": cache.read("coverage/words/probability", rows.start, rows.stop).astype(np.float32),
    }
    return pandas().DataFrame(found)
