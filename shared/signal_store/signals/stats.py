"""Small statistics of each segment."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.format.grid import rounded_capacity
from signal_store.format.layers import check_layers
from signal_store.format.section import DepthFraction, Section
from signal_store.signals.base import Dimensions, Meaning, Signal

ATTENTION_STATISTICS = ("normalised_entropy", "lookback", "largest_mass", "first_token_mass")
FFN_STATISTICS = ("near_zero_share", "hoyer_sparsity")


class StatsLayout(Section):
    """Which layers statistics are taken of; of the attention, those with softmax attention and their heads."""

    layers: tuple[int, ...]
    attention_layers: tuple[int, ...]
    num_heads: int


class StatsSignal(Signal):
    """Small statistics of each segment, float16, at the layers of `hidden`'s defaults or as numbered."""

    meanings: ClassVar[tuple[Meaning, ...]] = (
        Meaning(r"stats/attention/.+", "entropy over log length, look-back, largest mass, mass on the first token", "share"),
        Meaning(r"stats/ffn/.+", "share near zero, Hoyer's sparsity", "share"),
        Meaning(r"stats/gradient/.+", "log10 of the gradient's variance", "log10"),
    )

    attention: bool = True
    """Per layer and head: normalised entropy, look-back, largest mass, mass on the first token; mean over every 16th row."""
    ffn: bool = True
    """Per layer: share of FFN activations below a hundredth of their root mean square, and Hoyer's sparsity."""
    gradient: bool = False
    """Per layer: log10 of the variance of the loss's gradient with respect to the block's output. Needs a backward pass."""
    depths: tuple[DepthFraction, ...] = Field((0.25, 0.5, 0.75), min_length=1)
    layers: tuple[int, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.attention or self.ffn or self.gradient):
            raise ValueError("attention, ffn and gradient are all off: nothing would be stored")
        check_layers(self.layers, default=self.depths == type(self).model_fields["depths"].default)
        return self

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """One row a segment."""
        return stats_arrays(self, StatsLayout.model_validate(dimensions.calibration["stats"]), dimensions.capacities)


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
