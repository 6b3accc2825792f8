"""Roles of words, by their names."""

from typing import Any

from signal_store.format.roles import LEVELS
from signal_view.extras import pandas
from signal_view.segment_text import SegmentText
from signal_view.signals.base import SignalView, dataset_of


class TagsView(SignalView):
    """A row a token."""

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """See the base."""
        return {"/tags": dataset_of(roles(segment), lambda _: "text", "role of the word")}


def roles(segment: SegmentText) -> Any:
    """DataFrame, one row a token: what part its word plays at each level."""
    found = segment.cache.read("tags/roles", segment.token_start, segment.token_start + len(segment))
    columns = {level: [names[value] for value in found[:, n]] for n, (level, names) in enumerate(LEVELS.items())}
    return pandas().DataFrame({"piece": segment.tokens, **columns}, index=pandas().RangeIndex(len(segment), name="token"))
