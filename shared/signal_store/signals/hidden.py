"""Hidden states at chosen taps, layers and tokens."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.format.grid import coded_row_arrays, position_array, rounded_capacity, row_range_arrays
from signal_store.format.layers import check_layers
from signal_store.format.section import DepthFraction, Rank, Section, Seed
from signal_store.signals.base import Dimensions, Meaning, Signal

Tap = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
"""A place of a transformer block, by its name in `model_taps.taps`."""


class EveryNth(Section):
    """Every n-th token of a segment, counted from its first."""

    every: int = Field(ge=1, lt=2**31)


class RandomFraction(Section):
    """A seeded random share of each segment's tokens."""

    fraction: float = Field(gt=0, le=1)
    seed: Seed = 0


class Stratified(Section):
    """All keyword tokens, and a seeded random rest up to this share of each segment's tokens."""

    stratified: float = Field(gt=0, le=1)
    seed: Seed = 0


Positions = Literal["all", "keywords"] | EveryNth | RandomFraction | Stratified


class HiddenLayout(Section):
    """What is stored of one tap of one layer: `rank` directions of `width`, which keep `explained_variance` of it."""

    tap: Tap
    layer: int
    width: int
    rank: int | None
    explained_variance: float

    @property
    def group(self) -> str:
        """Its group in the hierarchy."""
        return f"hidden/{self.tap}/{self.layer}"


class HiddenSignal(Signal):
    """Hidden states at one or more taps, at depth fractions of the teacher or at numbered layers (1 is the first block)."""

    meanings: ClassVar[tuple[Meaning, ...]] = (Meaning(r"hidden/.+/values", "coordinates in units of the row's scale", "code"),)

    taps: tuple[Tap, ...] = Field(("block_output",), min_length=1)
    depths: tuple[DepthFraction, ...] = Field((0.25, 0.5, 0.75), min_length=1)
    layers: tuple[int, ...] | None = Field(None, min_length=1)
    positions: Positions = "all"
    """Which tokens, fixed when the plan is made: `all`, `keywords`, `{every: n}`, `{fraction: f}` or `{stratified: f}`."""
    rank: Rank | None = None
    """Principal directions kept; None keeps the full width."""
    values: Literal["int8", "float16"] = "int8"
    """How a coordinate is stored, in units of its row's scale."""

    @property
    def value_bits(self) -> int:
        """Of a stored coordinate."""
        return 8 if self.values == "int8" else 16

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.taps)) != len(self.taps):
            raise ValueError("a tap is named twice")
        check_layers(self.layers, default=self.depths == type(self).model_fields["depths"].default)
        return self

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """Where its rows are, unless every token has one; then the values of each tap and layer."""
        capacities = dimensions.capacities
        specs: list[ArraySpec] = []
        if self.positions != "all":
            specs += [*row_range_arrays("hidden", capacities.segments), position_array("hidden", capacities.hidden_rows)]
        for found in dimensions.calibration["hidden"]:
            specs += hidden_arrays(HiddenLayout.model_validate(found), self, dimensions.unit_tokens, capacities)
        return tuple(specs)


def hidden_arrays(layout: HiddenLayout, signal: HiddenSignal, unit_tokens: int, capacities: Capacities) -> tuple[ArraySpec, ...]:
    """One row per sampled token, of one tap and layer."""
    rows = unit_tokens if signal.positions == "all" else rounded_capacity(capacities.hidden_rows)
    axis = "channel" if layout.rank is None else "direction"
    return coded_row_arrays(layout.group, signal.values, rows, layout.rank or layout.width, axis)
