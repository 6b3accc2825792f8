"""Statistics of each segment."""

from dataclasses import dataclass

from torch import Tensor

from signal_store.cache import Cache
from student_train.data.part import Part
from student_train.data.placement import Placement
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class StatsPart(Part):
    """`attention` float16 [segments, H, 4] by teacher layer; `ffn` float16 [segments, layers, 2], or None where it is not asked
    for. NaN of a segment without a row to take them from."""

    attention: dict[int, Tensor]
    ffn: Tensor | None


@dataclass(frozen=True, slots=True)
class StatsRequest(Request):
    """Of the attention, by teacher layer; of the FFNs, at all layers that the cache has."""

    attention: tuple[int, ...] = ()
    ffn: bool = False

    @classmethod
    def whole(cls, cache: Cache) -> "StatsRequest":
        """See the base."""
        layout, signal = cache.manifest.calibration.stats, cache.manifest.signals.stats
        assert layout is not None
        assert signal is not None
        return cls(layout.attention_layers if signal.attention else (), signal.ffn)

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return tuple(f"{name}/" for name in self.described())

    def described(self) -> tuple[str, ...]:
        """See the base."""
        return (*(f"stats/attention/{layer}" for layer in self.attention), *(("stats/ffn",) if self.ffn else ()))

    def gather(self, placement: Placement) -> StatsPart:
        """See the base."""
        attention = {layer: placement.of_segments(f"stats/attention/{layer}/values") for layer in self.attention}
        return StatsPart(attention, placement.of_segments("stats/ffn/values") if self.ffn else None)
