"""The transformer blocks of a causal LM, and taps on what they give out.

A tap keeps the first firing only: activation checkpointing runs a block twice, and the second run belongs to backward.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

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


@contextlib.contextmanager
def tap_block_outputs(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, a forward pass fills the dict: layer (from 1) -> its output [B, S, d], in the model's dtype, in the graph.

    Equals `hidden_states[layer]` of `output_hidden_states=True`, but for the last block, which transformers normalises.
    """
    taken: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            taken.setdefault(layer, output if isinstance(output, Tensor) else output[0])

        return hook

    blocks = decoder_blocks(model)
    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


_DOWN_PROJECTIONS = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "wo", "fc_out")


def ffn_down_projections(model: PreTrainedModel) -> list[nn.Module]:
    """The module of each block that leads from the FFN's activations back to the residual stream.

    Raises ValueError for a block without one (fused experts have none of their own).
    """
    found = []
    for number, block in enumerate(decoder_blocks(model), start=1):
        named = [m for n, m in block.named_modules() if n.rsplit(".", 1)[-1] in _DOWN_PROJECTIONS and "attn" not in n]
        if not named:
            raise ValueError(
                f"{type(model).__name__}: block {number} has no FFN down-projection (looked for {', '.join(_DOWN_PROJECTIONS)})"
            )
        found.append(named[-1])
    return found


@contextlib.contextmanager
def tap_ffn_activations(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Within the block, a forward pass fills the dict: block (from 1) -> input of its down-projection [B, S, units]."""
    taken: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            taken.setdefault(layer, args[0])

        return hook

    handles = [m.register_forward_pre_hook(keep(i)) for i, m in enumerate(ffn_down_projections(model), start=1)]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def mean_abs_activation(activations: dict[int, Tensor], keep_BS: Tensor) -> Tensor:
    """Mean |a| over the kept tokens and all units, averaged over blocks; float32 scalar, 0 where no token is kept."""
    flat_N = keep_BS.flatten()  # some families walk their FFN without the batch axis
    per_block = [(a.float().flatten(0, -2).abs().mean(-1) * flat_N).sum() / flat_N.sum().clamp(min=1) for a in activations.values()]
    return torch.stack(per_block).mean()
