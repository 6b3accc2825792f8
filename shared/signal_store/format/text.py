"""The arrays of a cache's text: tokens and segments. Overlays leave them to their base."""

from signal_store.format.arrays import ArraySpec
from signal_store.format.grid import rounded_capacity

NO_TOKEN = 2**32 - 1
"""A segment's `next_token` where none is stored."""


def token_arrays(unit_tokens: int) -> tuple[ArraySpec, ...]:
    """`loss_mask`: 0 the row counts nowhere, 1 its label and its distribution count, 2 only its distribution does (the next
    token is not stored). `byte_end`: end of the token in its document's UTF-8."""
    return (
        ArraySpec.of("tokens/input_ids", "uint32", unit_tokens, "token", shuffle="bitshuffle"),
        ArraySpec.of("tokens/loss_mask", "uint8", unit_tokens, "token"),
        ArraySpec.of("tokens/byte_end", "uint32", unit_tokens, "token", shuffle="shuffle"),
    )


def segment_arrays(capacity: int) -> tuple[ArraySpec, ...]:
    """Starts are global; `next_token` is the label of the last row (fill where none is stored); `finished`: 1 where the
    segment ends its document as a model would have."""
    columns = {
        "token_start": "int64",
        "length": "uint32",
        "context_only": "uint32",
        "document": "uint64",
        "source": "uint16",
        "next_token": "uint32",
        "token_hash": "uint64",
        "finished": "uint8",
    }
    return tuple(
        ArraySpec.of(f"segments/{n}", t, rounded_capacity(capacity), "segment", shuffle="shuffle") for n, t in columns.items()
    )
