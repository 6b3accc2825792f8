"""The cache's calibrated constants on the training device: what codes are decoded with."""

from dataclasses import dataclass, field

import torch

from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.codecs.cached import distribution_codec, hidden_codec
from signal_store.codecs.distribution import DistributionCodec
from signal_store.codecs.hidden import HiddenCodec
from student_train.data.reader import Needs


@dataclass(slots=True)
class Codecs:
    """`distribution`, or None where nobody needs it, of as many directions as training uses, and `whole`, of all: what validation
    compares with. `hidden` by (tap, teacher layer)."""

    distribution: DistributionCodec | None
    whole: DistributionCodec | None = None
    hidden: dict[State, HiddenCodec] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: Cache, needs: Needs, device: torch.device, tail_rank: int | None = None) -> "Codecs":
        """Read what is needed of `calibration/`; of the tail, the first `tail_rank` directions."""
        distribution = whole = None
        if needs.distribution and cache.manifest.signals.distribution is not None:
            whole = distribution_codec(cache).to(device)
            distribution = whole.with_rank(whole.rank if tail_rank is None else min(whole.rank, tail_rank))
        wanted = [layout for layout in cache.manifest.calibration.hidden if (layout.tap, layout.layer) in needs.hidden]
        hidden = {(layout.tap, layout.layer): hidden_codec(cache, layout).to(device) for layout in wanted}
        return cls(distribution, whole, hidden)
