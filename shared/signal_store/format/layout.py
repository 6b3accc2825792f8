"""From what a cache holds to its arrays: the one place that knows their names, types and order of axes.

Arrays of one row per token share the global token index (unit * unit_tokens + place in unit). Sampled and ragged arrays have
a capacity of rows per unit; `<signal>/segments/` says where a segment's rows begin and how many there are.
"""

from typing import Any

from signal_store.format.arrays import LEVEL, ArraySpec
from signal_store.format.manifest import AttentionLayout, Capacities, HiddenLayout, StatsLayout
from signal_store.format.roles import LEVELS
from signal_store.signals import DistributionSignal, HiddenSignal, ReplaySignal, StatsSignal

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


def tag_arrays(unit_tokens: int) -> tuple[ArraySpec, ...]:
    """Roles of each token's word; what the numbers mean stands in the attributes."""
    names: dict[str, Any] = {level: ",".join(names) for level, names in LEVELS.items()}
    shape, columns = (len(LEVELS),), ",".join(LEVELS)
    return (ArraySpec.of("tags/roles", "uint8", unit_tokens, "token", "level", row_shape=shape, columns=columns, **names),)


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


def id_dtype(vocab_size: int) -> str:
    """Of token ids: 16 bits where the fill value stays free."""
    return "uint16" if vocab_size < 2**16 else "uint32"


def distribution_arrays(
    signal: DistributionSignal, rank: int, unit_tokens: int, vocab_size: int, *, zigzag: bool = True
) -> tuple[ArraySpec, ...]:
    """Head ids ascending; head codes below the row's maximum; tail codes (`zigzag` where they have 8 bits; older caches hold them
    as int8); scalars per token (half precision).

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
            id_dtype(vocab_size),
            unit_tokens,
            "token",
            "rank",
            row_shape=(signal.head_size,),
            min_chunk_rows=DISTRIBUTION_CHUNK_TOKENS,
        ),
        ArraySpec.of(
            "distribution/head_codes",
            "uint8" if signal.head_bits == 8 else "uint16",
            unit_tokens,
            "token",
            "rank",
            row_shape=(signal.head_size,),
        ),
    )
    zigzag &= signal.tail_bits == 8
    tail = ArraySpec.of(
        "distribution/tail_codes",
        "uint8" if zigzag else "int8" if signal.tail_bits == 8 else "int16",
        unit_tokens,
        "token",
        "direction",
        row_shape=(rank,),
        shuffle="bitshuffle" if zigzag else "noshuffle" if signal.tail_bits == 8 else "shuffle",
        transposed=True,
        level=LEVEL if zigzag else None,
        min_chunk_rows=DISTRIBUTION_CHUNK_TOKENS,
    )
    return (
        scalars,
        *(head if signal.head_size else ()),
        *((tail,) if rank else ()),
        *sampled_arrays(signal, unit_tokens, vocab_size),
    )


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


def sampled_arrays(signal: DistributionSignal, unit_tokens: int, vocab_size: int) -> tuple[ArraySpec, ...]:
    """Ids drawn from the softened distribution at each temperature, ascending; an id drawn twice stands twice."""
    return tuple(
        ArraySpec.of(
            sampled_path(temperature),
            id_dtype(vocab_size),
            unit_tokens,
            "token",
            "draw",
            row_shape=(signal.samples,),
            shuffle="shuffle",
        )
        for temperature in (signal.temperatures if signal.samples else ())
    )


def sampled_path(temperature: float) -> str:
    """Where the ids drawn at a temperature lie."""
    return f"distribution/sampled_ids_{temperature:g}"


def coded_row_arrays(group: str, values: str, rows: int, width: int, axis: str) -> tuple[ArraySpec, ArraySpec]:
    """`values` [row, width] in units of each row's float32 `scale`."""
    return (
        ArraySpec.of(f"{group}/values", values, rows, "row", axis, row_shape=(width,)),
        ArraySpec.of(f"{group}/scale", "float32", rows, "row", shuffle="shuffle"),
    )


def hidden_arrays(layout: HiddenLayout, signal: HiddenSignal, unit_tokens: int, capacities: Capacities) -> tuple[ArraySpec, ...]:
    """One row per sampled token, of one tap and layer."""
    rows = unit_tokens if signal.positions == "all" else rounded_capacity(capacities.hidden_rows)
    axis = "channel" if layout.rank is None else "direction"
    return coded_row_arrays(layout.group, signal.values, rows, layout.rank or layout.width, axis)


def attention_row_arrays(capacities: Capacities) -> tuple[ArraySpec, ...]:
    """What all stored layers share: each row's `position`, where its entries begin (`offset`, global) and how many it has
    (`length`), and `keyword`: 1, or 0 for a row that is only a step before one."""
    rows = rounded_capacity(capacities.attention_rows)
    return (
        position_array("attention", capacities.attention_rows),
        ArraySpec.of("attention/rows/offset", "int64", rows, "row", shuffle="shuffle"),
        ArraySpec.of("attention/rows/length", "uint32", rows, "row", shuffle="shuffle"),
        ArraySpec.of("attention/rows/keyword", "uint8", rows, "row"),
    )


def attention_arrays(layout: AttentionLayout, capacities: Capacities) -> tuple[ArraySpec, ...]:
    """Ragged rows on one flat entry axis, all stored heads side by side: 8-bit square-root codes."""
    heads = len(layout.head_ids)
    rows, entries = rounded_capacity(capacities.attention_rows), rounded_capacity(capacities.attention_entries)
    head_ids = ",".join(map(str, layout.head_ids))
    arrays = [ArraySpec.of(f"{layout.group}/weights", "uint8", entries, "entry", "head", row_shape=(heads,), head_ids=head_ids)]
    if layout.max_columns is not None:
        arrays += [
            ArraySpec.of(f"{layout.group}/columns", "uint32", entries, "entry", "head", row_shape=(heads,), shuffle="shuffle"),
            ArraySpec.of(f"{layout.group}/residual", "float16", rows, "row", "head", row_shape=(heads,), shuffle="shuffle"),
        ]
    return tuple(arrays)


ATTENTION_STATISTICS = ("normalised_entropy", "lookback", "largest_mass", "first_token_mass")
FFN_STATISTICS = ("near_zero_share", "hoyer_sparsity")


def stats_arrays(signal: StatsSignal, layout: StatsLayout, capacities: Capacities) -> tuple[ArraySpec, ...]:
    """Statistics of each segment; NaN where a segment has no row to take them from."""
    rows = rounded_capacity(capacities.segments)
    found = []
    for layer in layout.attention_layers if signal.attention else ():
        shape = (layout.num_heads, len(ATTENTION_STATISTICS))
        names = ",".join(ATTENTION_STATISTICS)
        found.append(
            ArraySpec.of(
                f"stats/attention/{layer}/values", "float16", rows, "segment", "head", "statistic", row_shape=shape, columns=names
            )
        )
    layers = ",".join(map(str, layout.layers))
    if signal.ffn:
        shape = (len(layout.layers), len(FFN_STATISTICS))
        names = ",".join(FFN_STATISTICS)
        found.append(
            ArraySpec.of(
                "stats/ffn/values", "float16", rows, "segment", "layer", "statistic", row_shape=shape, columns=names, layers=layers
            )
        )
    if signal.gradient:
        axes = ("segment", "layer")
        row_shape = (len(layout.layers),)
        found.append(ArraySpec.of("stats/gradient/log10_variance", "float16", rows, *axes, row_shape=row_shape, layers=layers))
    return tuple(found)


def replay_arrays(signal: ReplaySignal, layers: tuple[int, ...], width: int, capacities: Capacities) -> tuple[ArraySpec, ...]:
    """The path's differences from its start and its losses; the gradients at the layers."""
    rows = rounded_capacity(capacities.replay_rows)
    path = (
        ArraySpec.of("replay/path/values", "int8", rows, "row", "step", "channel", row_shape=(signal.steps, width)),
        ArraySpec.of("replay/path/scale", "float32", rows, "row", shuffle="shuffle"),
        ArraySpec.of("replay/path/nll", "float32", rows, "row", "state", row_shape=(signal.steps + 1,), shuffle="shuffle"),
    )
    gradients = [a for n in layers for a in coded_row_arrays(f"replay/gradient/{n}", "int8", rows, width, "channel")]
    return (position_array("replay", capacities.replay_rows), *path, *(gradients if signal.gradient else ()))


def evidence_arrays(layers: tuple[int, ...], capacities: Capacities) -> tuple[ArraySpec, ...]:
    """One row per sentence of a prompt: where it begins, its tokens, and by layer its share of the answer's attention."""
    rows = rounded_capacity(capacities.evidence_rows)
    shares = (ArraySpec.of(f"evidence/{n}/share", "float16", rows, "row", shuffle="shuffle") for n in layers)
    length = ArraySpec.of("evidence/rows/length", "uint32", rows, "row", shuffle="shuffle")
    return (position_array("evidence", capacities.evidence_rows), length, *shares)


def coverage_arrays(capacities: Capacities, vocab_size: int) -> tuple[ArraySpec, ...]:
    """One row per key word of a prompt: where it first stands, its first token, and the probability that the summary says it."""
    rows = rounded_capacity(capacities.coverage_rows)
    return (
        position_array("coverage", capacities.coverage_rows),
        ArraySpec.of("coverage/rows/token", id_dtype(vocab_size), rows, "row", shuffle="shuffle"),
        ArraySpec.of("coverage/words/probability", "float16", rows, "row", shuffle="shuffle"),
    )
