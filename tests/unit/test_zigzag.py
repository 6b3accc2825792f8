"""Zigzag codes: both ways, in numpy and in torch, and what the codec makes of them."""

import numpy as np
import torch

from signal_store.codecs.distribution import _signed
from signal_store.codecs.zigzag import from_zigzag, to_zigzag
from signal_store.format.arrays import FILL


def test_zigzag_is_there_and_back() -> None:
    codes = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    packed = to_zigzag(codes)
    assert packed.dtype == np.uint8
    assert np.array_equal(from_zigzag(packed), codes)
    assert np.array_equal(_signed(torch.from_numpy(packed)).numpy(), codes)
    assert to_zigzag(np.asarray([0, -1, 1, -2, 2, FILL["int8"]], np.int8)).tolist() == [0, 1, 2, 3, 4, FILL["uint8"]]
    assert torch.equal(_signed(torch.from_numpy(codes)), torch.from_numpy(codes))
