"""The path of a final hidden state up the gradient of its own loss."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.format.grid import coded_row_arrays, position_array, rounded_capacity, row_range_arrays
from signal_store.format.layers import check_layers
from signal_store.format.section import DepthFraction, Seed
from signal_store.signals.base import Dimensions, Meaning, Signal


class ReplaySignal(Signal):
    """The path of a final hidden state up the gradient of its own loss, through final norm and output head alone, at sampled
    positions of finished texts; with `gradient`, also the loss's gradient at the layers of `hidden`."""

    meanings: ClassVar[tuple[Meaning, ...]] = (
        Meaning(r"replay/.+/values", "coordinates in units of the row's scale", "code"),
        Meaning(r"replay/path/nll", "loss along the path", "nat"),
    )

    steps: int = Field(4, ge=1, le=64)
    step_size: float = Field(0.1, gt=0, le=10)
    """Length of a step, as a share of the state's own length."""
    positions_per_segment: int = Field(4, ge=1, lt=2**31)
    share: float = Field(1.0, gt=0, le=1)
    """Of the finished texts, those that are sampled, each drawn by its own tokens and the seed."""
    seed: Seed = 0
    gradient: bool = False
    depths: tuple[DepthFraction, ...] = Field((0.25, 0.5, 0.75), min_length=1)
    layers: tuple[int, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_layers(self.layers, default=self.depths == type(self).model_fields["depths"].default)
        return self

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """Where its rows are, the paths, the gradients at the layers."""
        capacities, layers = dimensions.capacities, tuple(dimensions.calibration["replay_layers"])
        found = replay_arrays(self, layers, dimensions.hidden_size, capacities)
        return (*row_range_arrays("replay", capacities.segments), *found)


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
