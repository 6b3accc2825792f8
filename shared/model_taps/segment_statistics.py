"""Small statistics of each segment: how sparse its FFNs are, of the teacher, into the cache, and of the student, in the graph; how
its gradients vary."""

import torch
from torch import Tensor

NEAR_ZERO = 1e-2
"""An activation counts as near zero below this share of its layer's root mean square over the segment."""


def ffn_statistics(activations_ND: Tensor, segment_n: Tensor, segments: int) -> Tensor:
    """[segments, 2], at least float32: share of activations below NEAR_ZERO of the segment's root mean square, and the mean over
    its tokens of Hoyer's sparsity (√D - |a|₁/|a|₂) / (√D - 1): 0 all alike, 1 a single one. NaN for a segment without a token."""
    a = activations_ND.to(torch.promote_types(activations_ND.dtype, torch.float32))
    width = a.shape[1]
    counts = torch.bincount(segment_n, minlength=segments).to(a)
    squares = a.new_zeros(segments).index_add(0, segment_n, a.square().mean(1))
    rms = (squares / counts).sqrt()
    near_zero = (a.abs() < NEAR_ZERO * rms[segment_n][:, None]).float().mean(1)
    hoyer = (width**0.5 - a.abs().sum(1) / a.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)) / (width**0.5 - 1)
    totals = a.new_zeros(segments, 2).index_add(0, segment_n, torch.stack([near_zero, hoyer], 1))
    return totals / counts[:, None]


def gradient_statistics(gradients_ND: Tensor, segment_n: Tensor, segments: int) -> Tensor:
    """[segments] float32: log10 of the variance of all components over the segment's tokens; NaN for a segment without one."""
    g = gradients_ND.float()
    counts = torch.bincount(segment_n, minlength=segments).to(g)
    mean = g.new_zeros(segments).index_add_(0, segment_n, g.mean(1)) / counts
    spread = g.new_zeros(segments).index_add_(0, segment_n, (g - mean[segment_n][:, None]).square().mean(1)) / counts
    return spread.clamp(min=1e-30).log10()
