"""Shapes that arrays of several signals share.

Arrays of one row per token share the global token index (unit * unit_tokens + place in unit). Sampled and ragged arrays have a
capacity of rows per unit; `<signal>/segments/` says where a segment's rows begin and how many there are.
"""

from signal_store.format.arrays import ArraySpec


def rounded_capacity(rows: int) -> int:
    """A power of two of at least `rows`: every array of a sampled signal then has the same rows, whatever its row's bytes."""
    return 1 << (max(1, rows) - 1).bit_length()


def id_dtype(vocab_size: int) -> str:
    """Of token ids: 16 bits where the fill value stays free."""
    return "uint16" if vocab_size < 2**16 else "uint32"


def row_range_arrays(signal: str, capacity: int) -> tuple[ArraySpec, ...]:
    """Where each segment's rows of a sampled signal begin (globally), and how many there are."""
    rows = rounded_capacity(capacity)
    return (
        ArraySpec.of(f"{signal}/segments/row_start", "int64", rows, "segment", shuffle="shuffle"),
        ArraySpec.of(f"{signal}/segments/rows", "uint32", rows, "segment", shuffle="shuffle"),
    )


def position_array(signal: str, capacity: int) -> ArraySpec:
    """Global token index of each row of a sampled signal."""
    return ArraySpec.of(f"{signal}/rows/position", "int64", rounded_capacity(capacity), "row", shuffle="shuffle")


def coded_row_arrays(group: str, values: str, rows: int, width: int, axis: str) -> tuple[ArraySpec, ArraySpec]:
    """`values` [row, width] in units of each row's float32 `scale`."""
    return (
        ArraySpec.of(f"{group}/values", values, rows, "row", axis, row_shape=(width,)),
        ArraySpec.of(f"{group}/scale", "float32", rows, "row", shuffle="shuffle"),
    )
