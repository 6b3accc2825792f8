"""The cache's calibrated constants on the training device: what codes are decoded with."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from model_taps.slices import State
from signal_store.cache import Cache
from signal_store.distribution_codec import DistributionCodec
from signal_store.hidden_codec import HiddenCodec
from student_train.stream.reader import Needs


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
        signal = cache.manifest.signals.distribution
        distribution = whole = None
        if needs.distribution and signal is not None:
            rank = cache.manifest.calibration.tail_rank
            names = ("head_range", "tail_bias", *(("mean", "encode_matrix", "tail_step", "tail_basis") if rank else ()))
            arrays = {f"distribution/{name}": _constant(cache, f"distribution/{name}") for name in names}
            if not rank:  # zarr keeps no array of no columns
                empty = np.zeros((len(arrays["distribution/tail_bias"]), 0), np.float32)
                arrays |= {f"distribution/{name}": empty for name in ("mean", "encode_matrix", "tail_basis")}
                arrays["distribution/tail_step"] = np.zeros(0, np.float32)
            whole = DistributionCodec.from_arrays(arrays, signal, cache.manifest.teacher.logit_softcap).to(device)
            distribution = whole.with_rank(rank if tail_rank is None else min(rank, tail_rank))
        hidden = {}
        held = cache.manifest.signals.hidden
        for layout in cache.manifest.calibration.hidden:
            if (layout.tap, layout.layer) in needs.hidden:
                names = ("mean", "spread", *(("basis",) if layout.rank is not None else ()))
                place = layout.group.replace("/", ".")
                found = {f"{layout.group}/{name}": _constant(cache, f"{place}/{name}") for name in names}
                bits = 8 if held is None or held.values == "int8" else 16
                hidden[layout.tap, layout.layer] = HiddenCodec.from_arrays(found, layout.group, bits).to(device)
        return cls(distribution, whole, hidden)


def _constant(cache: Cache, path: str) -> NDArray[np.float32]:
    return cache.read(f"calibration/{path}").astype(np.float32, copy=False)
