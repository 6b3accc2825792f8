"""What each array of a cache says, and in which unit: by the pattern of its path."""

import re

MEANING: tuple[tuple[str, str, str], ...] = (
    (r"tokens/input_ids", "token id", "id"),
    (r"tokens/loss_mask", "0 counts nowhere, 1 label and distribution count, 2 its distribution does", "flag"),
    (r"tokens/byte_end", "end of the token in its document's UTF-8", "byte"),
    (r"segments/token_start", "global index of the first token", "token"),
    (r"segments/(length|context_only)", "tokens", "token"),
    (r"segments/next_token", "label of the last row", "id"),
    (r"segments/(document|source)", "number", "number"),
    (r"segments/token_hash", "hash of the tokens", "hash"),
    (r"segments/finished", "ends as its document does", "flag"),
    (r"distribution/head_ids", "the likeliest tokens, ascending", "id"),
    (r"distribution/head_codes", "distance below the row's largest log-probability, square-root code", "code"),
    (r"distribution/tail_codes", "coordinates of the final hidden state; unsigned: zigzag", "code"),
    (r"distribution/scalars", "log-probabilities, entropy, log of head mass over tail mass by temperature", "nat"),
    (r"distribution/sampled_ids_(.+)", "tokens drawn at a temperature", "id"),
    (r"hidden/.+/values|replay/.+/values", "coordinates in units of the row's scale", "code"),
    (r".+/scale", "scale of the row", "activation"),
    (r"attention/\d+/weights", "attention probability, square-root code", "code"),
    (r"attention/\d+/columns", "key, counted from the segment's first token", "token"),
    (r"attention/\d+/residual", "probability of the keys left out", "probability"),
    (r".+/rows/position", "global index of the row's token", "token"),
    (r".+/rows/offset", "first entry of the row", "entry"),
    (r".+/rows/length", "entries or tokens of the row", "token"),
    (r"attention/rows/keyword", "a keyword's own row", "flag"),
    (r".+/segments/(row_start|rows)", "rows of the segment", "row"),
    (r"stats/attention/.+", "entropy over log length, look-back, largest mass, mass on the first token", "share"),
    (r"stats/ffn/.+", "share near zero, Hoyer's sparsity", "share"),
    (r"stats/gradient/.+", "log10 of the gradient's variance", "log10"),
    (r"replay/path/nll", "loss along the path", "nat"),
    (r"evidence/.+/share", "share of the answer's attention", "share"),
    (r"coverage/rows/token", "first token of a key word", "id"),
    (r"coverage/words/probability", "probability that the summary says it", "probability"),
    (r"tags/roles", "roles of the token's word", "code"),
)


def meaning(path: str) -> tuple[str, str]:
    """(what it is, unit); of an array that this version does not know, its path and "unknown"."""
    for pattern, what, unit in MEANING:
        if re.fullmatch(pattern, path):
            return what, unit
    return path, "unknown"
