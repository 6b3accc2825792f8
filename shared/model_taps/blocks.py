"""The transformer blocks of a causal LM: how many, which, and which stands at a depth."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def num_layers(model: PreTrainedModel) -> int:
    """Number of transformer blocks."""
    return int(model.config.get_text_config().num_hidden_layers)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks: the one ModuleList of the base model that is as long as the config says."""
    found = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers(model)]
    if not found:
        raise ValueError(f"{type(model).__name__}: no list of {num_layers(model)} blocks found")
    return found[0]


def layer_at_depth(fraction: float, layers: int) -> int:
    """The block whose output stands at a depth fraction: round-half-up of fraction * layers, at least 1 (block numbers from 1)."""
    return max(1, math.floor(fraction * layers + 0.5))


def mean_abs_activation(activations: Iterable[Tensor], keep_BS: Tensor) -> Tensor:
    """Mean |a| over the kept tokens and all units, averaged over blocks; float32 scalar, 0 where no token is kept."""
    flat_N = keep_BS.flatten()  # some families walk their FFN without the batch axis
    per_block = [(a.float().flatten(0, -2).abs().mean(-1) * flat_N).sum() / flat_N.sum().clamp(min=1) for a in activations]
    return torch.stack(per_block).mean()
