"""How a recipe says in which proportions and in which order a cache is read."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from signal_store.format.section import Section, Seed


class MixSection(Section):
    """Train sources in other proportions: a weight for each by name, 0 to leave one out, counted by tokens or by samples
    (segments)."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    by: Literal["tokens", "samples"] = "tokens"


class StreamSection(Section):
    """How the cache is read. A step is `global_batch_rows` rows of `sequence_length` tokens over all ranks and micro-steps."""

    renamed: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"row_tokens": "sequence_length", "rows_per_step": "global_batch_rows", "micro_rows": "micro_batch_rows"}
    )

    sequence_length: int = Field(1024, ge=2)
    global_batch_rows: int = Field(32, ge=1)
    micro_batch_rows: int | None = Field(None, ge=1)
    """Rows of one forward pass; None is all of a rank's."""
    lanes: int = Field(4, ge=1)
    """Rows come from this many places of the order in turn; ranks whose runs lie in different lanes read different units."""
    window_units: int = Field(1, ge=1)
    """Units of a lane that are shuffled together. A process holds two windows of each lane that it draws from."""
    mix: MixSection | None = None
    workers: int = Field(1, ge=0)
    """Processes that make micro-batches ahead of the step; 0 makes them in line."""
    seed: Seed = 0
    """Of the order; the run's own `seed` where it is left out."""

    @property
    def forward_rows(self) -> int:
        """Rows of the largest forward pass that it may come to."""
        return self.micro_batch_rows or self.global_batch_rows
