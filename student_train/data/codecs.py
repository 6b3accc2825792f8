"""The cache's calibrated constants on the training device: what codes are decoded with."""

from dataclasses import dataclass, field
from typing import Any

import torch

from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.codecs.distribution import DistributionCodec
from signal_store.codecs.hidden import HiddenCodec
from student_train.data.request import SignalRequest


@dataclass(slots=True)
class Codecs:
    """`distribution`, or None where nobody needs it, of as many directions as training uses, and `whole`, of all: what validation
    compares with. `signals`: by name, what the codes of each signal that is read are decoded with."""

    distribution: DistributionCodec | None = None
    whole: DistributionCodec | None = None
    signals: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: Cache, request: SignalRequest, device: torch.device, tail_rank: int | None = None) -> "Codecs":
        """Read what is needed of `calibration/`; of the tail, the first `tail_rank` directions."""
        signals = {signal.signal(): signal.codecs(cache, device) for signal in request}
        whole: DistributionCodec | None = signals.get("distribution")
        used = whole if whole is None or tail_rank is None else whole.with_rank(min(whole.rank, tail_rank))
        return cls(used, whole, signals)

    @property
    def hidden(self) -> dict[State, HiddenCodec]:
        """Of hidden states, by (tap, teacher layer)."""
        found: dict[State, HiddenCodec] = self.signals.get("hidden", {})
        return found
