"""Attention probabilities as 8-bit square-root codes: fine near zero, where most of a row lives. 255 is never a code."""

import torch
from torch import Tensor

LEVELS = 254
MAX_ERROR = 1 / LEVELS
"""Largest |a - decode(encode(a))| for a in [0, 1]: half a step of √a at √a = 1, doubled by squaring."""


def encode_attention(probabilities: Tensor) -> Tensor:
    """uint8 codes of probabilities in [0, 1]."""
    return probabilities.clamp(0, 1).sqrt().mul(LEVELS).round().to(torch.uint8)


def decode_attention(codes: Tensor) -> Tensor:
    """float32 probabilities; not renormalised."""
    return (codes.float() / LEVELS).square()
