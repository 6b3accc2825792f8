"""Rows of hidden states or gradients, coded, as several signals hold them."""

import torch
from torch import Tensor

from signal_store.codecs.hidden import HiddenCodec
from teacher_cache.signals.extracted import Extracted, numpy_of


@torch.inference_mode()
def coded_states(codec: HiddenCodec, group: str, states_PD: Tensor) -> Extracted:
    """Values and their scales of P rows, under `group`."""
    values, scale = codec.encode(states_PD)
    dtype = "int8" if values.dtype == torch.int8 else "float16"
    return Extracted({f"{group}/values": numpy_of(values, dtype), f"{group}/scale": numpy_of(scale, "float32")})
