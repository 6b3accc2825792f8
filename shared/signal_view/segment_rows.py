"""Which rows of the cache's arrays are a segment's, and what stands beside them.

Row t predicts token t + 1: `next_piece` at t is the text of token t + 1.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.errors import InputError
from signal_view.segment_text import SegmentText


def labels_of(segment: SegmentText) -> NDArray[np.int64]:
    """int64 [n]: the token that each row predicts, -1 for the last one where none is stored."""
    after = -1 if segment.next_token is None else segment.next_token
    return np.append(segment.input_ids[1:].astype(np.int64), after)


def own_places(segment: SegmentText) -> slice:
    """Places of the segment whose rows are its own; those before are context, and stored elsewhere."""
    return slice(segment.context_only, len(segment))


def own_rows(segment: SegmentText) -> slice:
    """Its rows of arrays with one row a token."""
    own = own_places(segment)
    return slice(segment.token_start + own.start, segment.token_start + own.stop)


def place_among(segment: SegmentText, place: int) -> int:
    """The place, if the segment has a row of its own there; InputError if not."""
    if not segment.context_only <= place < len(segment):
        expected, where = f"{segment.context_only} to {len(segment) - 1}", f"segment {segment.index}"
        raise InputError("no such token", expected=expected, found=place, where=where)
    return place


def row_coordinates(segment: SegmentText, places: NDArray[np.int64]) -> dict[str, Any]:
    """Coordinates of rows: place in the segment, piece of the token, piece that follows."""
    pieces = np.asarray([*segment.tokens, segment.next_piece or ""], dtype=object)
    return {"piece": ("token", pieces[places]), "next_piece": ("token", pieces[places + 1])}


def sampled_rows(segment: SegmentText, signal: str) -> slice:
    """Its rows of a sampled signal."""
    columns = segment.columns(f"{signal}/segments", "row_start", "rows")
    return slice(columns["row_start"], columns["row_start"] + columns["rows"])


def sampled_places(segment: SegmentText, signal: str, rows: slice) -> NDArray[np.int64]:
    """Which token of the segment each of these rows of a sampled signal is of."""
    found: NDArray[np.int64] = segment.cache.read(f"{signal}/rows/position", rows.start, rows.stop) - segment.token_start
    return found
