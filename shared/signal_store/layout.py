"""From what a cache holds to its arrays: the one place that knows their names, types and order of axes.

Arrays of one row per token share the global token index (unit * unit_tokens + place in unit). Sampled and ragged arrays have
a capacity of rows per unit; `segments/` says where a segment's rows begin and how many there are.
"""

from signal_store.arrays import ArraySpec
from signal_store.manifest import AttentionLayout, Capacities, HiddenLayout
from signal_store.signals import DistributionSignal

DISTRIBUTION_CHUNK_TOKENS = 16_384


def rounded_capacity(rows: int) -> int:
    """A power of two of at least `rows`: every array of a sampled signal then has the same rows, whatever its row's bytes."""
    return 1 << (max(1, rows) - 1).bit_length()


SCALARS = ("max_logprob", "label_logprob", "entropy")
"""Columns of `distribution/scalars` before the log mass ratios, one per cached temperature."""


def token_arrays(unit_tokens: int) -> tuple[ArraySpec, ...]:
    """`loss_mask`: 0 the row counts nowhere, 1 its label and its distribution count, 2 only its distribution does (the next
    token is not stored). `byte_end`: end of the token in its document's UTF-8."""
    return (
        ArraySpec.of("tokens/input_ids", "uint32", unit_tokens, "token", shuffle="bitshuffle"),
        ArraySpec.of("tokens/loss_mask", "uint8", unit_tokens, "token"),
        ArraySpec.of("tokens/byte_end", "uint32", unit_tokens, "token", shuffle="shuffle"),
    )


def segment_arrays(capacity: int) -> tuple[ArraySpec, ...]:
    """Starts are global; `next_token` is the label of the last row (fill where none is stored)."""
    columns = {
        "token_start": "int64",
        "length": "uint32",
        "context_only": "uint32",
        "document": "uint64",
        "source": "uint16",
        "next_token": "uint32",
        "token_hash": "uint64",
        "hidden_row_start": "int64",
        "hidden_rows": "uint32",
        "attention_row_start": "int64",
        "attention_rows": "uint32",
    }
    return tuple(
        ArraySpec.of(f"segments/{n}", t, rounded_capacity(capacity), "segment", shuffle="shuffle") for n, t in columns.items()
    )


def distribution_arrays(signal: DistributionSignal, rank: int, unit_tokens: int) -> tuple[ArraySpec, ...]:
    """Head ids ascending; head codes below the row's maximum; tail codes; scalars per token (half precision).

    The `temperatures` attribute names the columns of `scalars` after those of SCALARS: log(head mass / tail mass) at each.
    """
    columns = len(SCALARS) + len(signal.temperatures)
    scalars = ArraySpec.of(
        "distribution/scalars",
        "float16",
        unit_tokens,
        "token",
        "scalar",
        row_shape=(columns,),
        shuffle="shuffle",
        min_chunk_rows=DISTRIBUTION_CHUNK_TOKENS,
        columns=",".join((*SCALARS, *(f"log_mass_ratio@{t:g}" for t in signal.temperatures))),
    )
    head = (
        ArraySpec.of(
            "distribution/head_ids",
            "uint32",
            unit_tokens,
            "token",
            "rank",
            row_shape=(signal.head,),
            min_chunk_rows=DISTRIBUTION_CHUNK_TOKENS,
        ),
        ArraySpec.of(
            "distribution/head_codes",
            "uint8" if signal.head_bits == 8 else "uint16",
            unit_tokens,
            "token",
            "rank",
            row_shape=(signal.head,),
        ),
    )
    tail = ArraySpec.of(
        "distribution/tail_codes",
        "int8" if signal.tail_bits == 8 else "int16",
        unit_tokens,
        "token",
        "direction",
        row_shape=(rank,),
        shuffle="noshuffle" if signal.tail_bits == 8 else "shuffle",
        transposed=True,
        min_chunk_rows=DISTRIBUTION_CHUNK_TOKENS,
    )
    return (scalars, *(head if signal.head else ()), *((tail,) if rank else ()))


def hidden_arrays(layout: HiddenLayout, every: int, unit_tokens: int, capacities: Capacities) -> tuple[ArraySpec, ...]:
    """One row per sampled token: int8 values and their float32 scale; `position` (global token index) unless all are kept."""
    group = f"hidden/block_output/{layout.layer}"
    rows = unit_tokens if every == 1 else rounded_capacity(capacities.hidden_rows)
    values = ArraySpec.of(
        f"{group}/values",
        "int8",
        rows,
        "row",
        "channel" if layout.rank is None else "direction",
        row_shape=(layout.rank or layout.width,),
    )
    scale = ArraySpec.of(f"{group}/scale", "float32", rows, "row", shuffle="shuffle")
    position = ArraySpec.of(f"{group}/position", "int64", rows, "row", shuffle="shuffle")
    return (values, scale) if every == 1 else (values, scale, position)


def attention_arrays(layout: AttentionLayout, capacities: Capacities) -> tuple[ArraySpec, ...]:
    """Ragged rows on one flat entry axis, all stored heads side by side: 8-bit square-root codes."""
    group = f"attention/{layout.layer}"
    heads = len(layout.head_ids)
    head_ids = ",".join(map(str, layout.head_ids))
    rows, entries = rounded_capacity(capacities.attention_rows), rounded_capacity(capacities.attention_entries)
    arrays = [
        ArraySpec.of(f"{group}/position", "int64", rows, "row", shuffle="shuffle"),
        ArraySpec.of(f"{group}/offset", "int64", rows, "row", shuffle="shuffle"),
        ArraySpec.of(f"{group}/length", "uint32", rows, "row", shuffle="shuffle"),
        ArraySpec.of(f"{group}/weights", "uint8", entries, "entry", "head", row_shape=(heads,), head_ids=head_ids),
    ]
    if layout.max_columns is not None:
        arrays += [
            ArraySpec.of(f"{group}/columns", "uint32", entries, "entry", "head", row_shape=(heads,), shuffle="shuffle"),
            ArraySpec.of(f"{group}/residual", "float16", rows, "row", "head", row_shape=(heads,), shuffle="shuffle"),
        ]
    return tuple(arrays)
