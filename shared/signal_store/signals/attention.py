"""Attention rows of keyword tokens."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.format.grid import position_array, rounded_capacity, row_range_arrays
from signal_store.format.section import Section
from signal_store.signals.base import Dimensions, Meaning, Signal

DEFAULT_KEYWORDS = ("def", "class", "if", "elif", "else", "for", "while", "return", "try", "except", "with")


class AttentionLayout(Section):
    """Which heads are stored of one layer."""

    layer: int
    head_ids: tuple[int, ...]
    max_columns: int | None

    @property
    def group(self) -> str:
        """Its group in the hierarchy."""
        return f"attention/{self.layer}"


class AttentionSignal(Signal):
    """Attention rows of keyword tokens (as query): chosen or the most focused heads of chosen softmax-attention layers."""

    meanings: ClassVar[tuple[Meaning, ...]] = (
        Meaning(r"attention/rows/offset", "first entry of the row", "entry"),
        Meaning(r"attention/rows/length", "entries of the row", "entry"),
        Meaning(r"attention/\d+/weights", "attention probability, square-root code", "code"),
        Meaning(r"attention/\d+/columns", "key, counted from the segment's first token", "token"),
        Meaning(r"attention/\d+/residual", "probability of the keys left out", "probability"),
        Meaning(r"attention/rows/keyword", "a keyword's own row", "flag"),
    )

    layers: tuple[int, ...] | Literal["last"] = "last"
    """Blocks by number, 1 the first; `last` is the last block that has softmax attention."""
    heads: int | tuple[int, ...] = 3
    """How many of the most focused heads, found in calibration; or their numbers, from 0."""
    keywords: tuple[str, ...] = DEFAULT_KEYWORDS
    previous_steps: int = Field(0, ge=0, le=64)
    """Rows of this many tokens before each keyword are stored too."""
    max_columns: int | None = Field(None, ge=1, lt=2**31)
    """Store only the m heaviest columns of a row and its residual mass. None: 64 where the context exceeds 1,024, else all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (isinstance(self.heads, int) and self.heads < 1) or self.heads == ():
            raise ValueError("heads must be at least one")
        if self.layers == () or not self.keywords:
            raise ValueError("layers and keywords must name at least one")
        for name in ("layers", "heads"):
            chosen = getattr(self, name)
            if isinstance(chosen, tuple) and len(set(chosen)) != len(chosen):
                raise ValueError(f"{name} names one twice")
        return self

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """What all layers share, then the entries of each."""
        capacities = dimensions.capacities
        specs = [*row_range_arrays("attention", capacities.segments), *attention_row_arrays(capacities)]
        for found in dimensions.calibration["attention"]:
            specs += attention_arrays(AttentionLayout.model_validate(found), capacities)
        return tuple(specs)


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
