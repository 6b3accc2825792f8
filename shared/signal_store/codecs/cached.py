"""The codecs of a sealed cache, from its calibrated constants: what its codes are decoded with."""

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.codecs.distribution import DistributionCodec
from signal_store.codecs.hidden import HiddenCodec
from signal_store.errors import MismatchError
from signal_store.signals import HiddenLayout


def distribution_codec(cache: Cache) -> DistributionCodec:
    """Of all cached directions, on the CPU; MismatchError where the cache holds no distribution."""
    signal, rank = cache.manifest.signals.distribution, cache.manifest.calibration.tail_rank
    if signal is None:
        raise MismatchError("the cache holds no distribution", expected="signals.distribution", found="none", where=cache.uri)
    names = ("head_range", "tail_bias", *(("mean", "encode_matrix", "tail_step", "tail_basis") if rank else ()))
    arrays = {f"distribution/{name}": _constant(cache, f"distribution/{name}") for name in names}
    if not rank:  # zarr keeps no array of no columns
        empty = np.zeros((len(arrays["distribution/tail_bias"]), 0), np.float32)
        arrays |= {f"distribution/{name}": empty for name in ("mean", "encode_matrix", "tail_basis")}
        arrays["distribution/tail_step"] = np.zeros(0, np.float32)
    return DistributionCodec.from_arrays(arrays, signal, cache.manifest.teacher.logit_softcap)


def hidden_codec(cache: Cache, layout: HiddenLayout) -> HiddenCodec:
    """Of one tap of one layer, on the CPU."""
    names = ("mean", "spread", *(("basis",) if layout.rank is not None else ()))
    place, signal = layout.group.replace("/", "."), cache.manifest.signals.hidden
    found = {f"{layout.group}/{name}": _constant(cache, f"{place}/{name}") for name in names}
    bits = 8 if signal is None else signal.value_bits
    return HiddenCodec.from_arrays(found, layout.group, bits)


def _constant(cache: Cache, path: str) -> NDArray[np.float32]:
    return cache.read(f"calibration/{path}").astype(np.float32, copy=False)
