"""Hidden states, of the tokens that were sampled."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.codecs.cached import hidden_codec
from signal_store.codecs.hidden import HiddenCodec
from student_train.data.batch import CodedBatch
from student_train.data.part import Part
from student_train.data.placement import Placement
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class HiddenCodes:
    """Sampled outputs of one teacher layer: int8 or float16 `values` [P, width or rank], float32 `scale` [P]."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class HiddenPart(Part):
    """`flat` int64 [P]: where the sampled tokens stand; `states` by tap and teacher layer; `segment_rows`: how many of the P each
    segment has."""

    flat: Tensor
    states: dict[State, HiddenCodes]
    segment_rows: tuple[int, ...]

    @classmethod
    def of(cls, batch: CodedBatch) -> "HiddenPart":
        """The batch's; an empty one where it has none, as where there is no segment."""
        return batch.part(cls) or cls(batch.flat[:0], {}, ())


@dataclass(frozen=True, slots=True)
class HiddenRequest(Request):
    """`states` by (tap, teacher layer)."""

    aligns: ClassVar[bool] = True

    states: tuple[State, ...]

    @classmethod
    def whole(cls, cache: Cache) -> "HiddenRequest":
        """See the base."""
        return cls(tuple((layout.tap, layout.layer) for layout in cache.manifest.calibration.hidden))

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return ("hidden/rows/", *(f"{name}/" for name in self.described())) if self.states else ()

    def described(self) -> tuple[str, ...]:
        """See the base."""
        return tuple(f"hidden/{tap}/{layer}" for tap, layer in self.states)

    def codecs(self, cache: Cache, device: torch.device) -> dict[State, HiddenCodec]:
        """By tap and teacher layer."""
        wanted = [layout for layout in cache.manifest.calibration.hidden if (layout.tap, layout.layer) in self.states]
        return {(layout.tap, layout.layer): hidden_codec(cache, layout).to(device) for layout in wanted}

    def gather(self, placement: Placement) -> HiddenPart:
        """See the base; context has no states of its own."""
        rows = placement.rows("hidden")
        places = placement.places("hidden", rows)
        states = {}
        for tap, layer in self.states:
            values, scale = (placement.gathered(f"hidden/{tap}/{layer}/{name}", rows) for name in ("values", "scale"))
            states[tap, layer] = HiddenCodes(values, scale)
        return HiddenPart(placement.flat(places), states, tuple(len(mine) for mine in rows))
