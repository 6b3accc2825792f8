"""What each array of a cache says, and in which unit: by the pattern of its path."""

import re

from signal_store import signals

TEXT: tuple[tuple[str, str, str], ...] = (
    (r"tokens/input_ids", "token id", "id"),
    (r"tokens/loss_mask", "0 counts nowhere, 1 label and distribution count, 2 its distribution does", "flag"),
    (r"tokens/byte_end", "end of the token in its document's UTF-8", "byte"),
    (r"segments/token_start", "global index of the first token", "token"),
    (r"segments/(length|context_only)", "tokens", "token"),
    (r"segments/next_token", "label of the last row", "id"),
    (r"segments/(document|source)", "number", "number"),
    (r"segments/token_hash", "hash of the tokens", "hash"),
    (r"segments/finished", "ends as its document does", "flag"),
    (r".+/scale", "scale of the row", "activation"),
    (r".+/rows/position", "global index of the row's token", "token"),
    (r".+/segments/(row_start|rows)", "rows of the segment", "row"),
)
"""Of the arrays of the text, and of those that several signals share."""


def meaning(path: str) -> tuple[str, str]:
    """(what it is, unit); of an array that this version does not know, its path and "unknown"."""
    own = signals.meaning(path)
    if own is not None:
        return own
    shared = ((what, unit) for pattern, what, unit in TEXT if re.fullmatch(pattern, path))
    return next(shared, (path, "unknown"))
