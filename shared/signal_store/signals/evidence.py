"""Which sentences of a question its answer looks at."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.format.grid import position_array, rounded_capacity, row_range_arrays
from signal_store.format.layers import check_layers
from signal_store.format.section import DepthFraction
from signal_store.signals.base import Dimensions, Meaning, Signal


class EvidenceSignal(Signal):
    """Which sentences of a question its answer looks at, of sources with `task: qa`: the share of attention that
    each sentence of the prompt gets from the answer's rows, at the layers with softmax attention among those at these depths."""

    meanings: ClassVar[tuple[Meaning, ...]] = (
        Meaning(r"evidence/rows/length", "tokens of the sentence", "token"),
        Meaning(r"evidence/.+/share", "share of the answer's attention", "share"),
    )

    depths: tuple[DepthFraction, ...] = Field((0.5, 0.75), min_length=1)
    layers: tuple[int, ...] | None = Field(None, min_length=1)
    queries: int = Field(32, ge=1, le=65_536)
    """Rows of the answer that are looked at, evenly spread."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_layers(self.layers, default=self.depths == type(self).model_fields["depths"].default)
        return self

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """One row a sentence."""
        capacities, layers = dimensions.capacities, tuple(dimensions.calibration.get("evidence_layers", ()))
        return (*row_range_arrays("evidence", capacities.segments), *evidence_arrays(layers, capacities))


def evidence_arrays(layers: tuple[int, ...], capacities: Capacities) -> tuple[ArraySpec, ...]:
    """One row per sentence of a prompt: where it begins, its tokens, and by layer its share of the answer's attention."""
    rows = rounded_capacity(capacities.evidence_rows)
    shares = (ArraySpec.of(f"evidence/{n}/share", "float16", rows, "row", shuffle="shuffle") for n in layers)
    length = ArraySpec.of("evidence/rows/length", "uint32", rows, "row", shuffle="shuffle")
    return (position_array("evidence", capacities.evidence_rows), length, *shares)
