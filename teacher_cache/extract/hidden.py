"""Outputs of transformer blocks at the sampled tokens."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from signal_store.hidden_codec import HiddenCodec
from teacher_cache.extract.rows import Extracted, numpy_of


@torch.inference_mode()
def extract_hidden(codec: HiddenCodec, layer: int, states_ND: Tensor, places: NDArray[np.int64]) -> Extracted:
    """int8 values and their scale at `places`, which count from the batch's first token."""
    values, scale = codec.encode(states_ND[torch.from_numpy(places).to(states_ND.device)])
    group = f"hidden/block_output/{layer}"
    return Extracted({f"{group}/values": numpy_of(values, "int8"), f"{group}/scale": numpy_of(scale, "float32")}, {})
