"""The transformer blocks of a causal LM: how many, which, and which stands at a depth."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from signal_store.errors import InputError


def model_body(model: PreTrainedModel) -> nn.Module:
    """The model without its output head. InputError where the family keeps it nowhere that can be found."""
    body = model.base_model
    if body is not model:
        return body
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1:
        raise unsupported(model, "no body apart from the output head", f"{len(inside)} models inside it")
    return inside[0]


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The part of the body that reads text, of a model that reads other things too; else the body."""
    found = model.get_decoder() if callable(getattr(model, "get_decoder", None)) else None
    return found if isinstance(found, nn.Module) and found is not model else model_body(model)


def unsupported(model: PreTrainedModel, what: str, found: object) -> InputError:
    """The error for a family that is not built as others are; `what` says which part."""
    return InputError(
        f"this family is not supported: {what}", found=found, where=f"{model.config.model_type} ({type(model).__name__})"
    )


def num_layers(model: PreTrainedModel) -> int:
    """Number of transformer blocks, one at least."""
    found = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(found, int):
        raise unsupported(model, "its config does not say how many blocks there are", "no num_hidden_layers")
    refuse_no_blocks(model.config)
    return found


def refuse_no_blocks(config: PretrainedConfig) -> None:
    """InputError where a config asks for no blocks: a model that sees one token at a time."""
    found = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(found, int) and found < 1:
        raise InputError("a model without blocks", expected="num_hidden_layers of 1 or more", found=found, where=config.model_type)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks: of the text decoder's lists as long as the config says, the one with the most weights."""
    body, count = text_decoder(model), num_layers(model)
    found = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise unsupported(model, f"no list of {count} blocks", f"none in {type(body).__name__}")
    return max(found, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def layer_at_depth(fraction: float, layers: int) -> int:
    """The block whose output stands at a depth fraction: round-half-up of fraction * layers, at least 1 (block numbers from 1)."""
    return max(1, math.floor(fraction * layers + 0.5))


def mean_abs_activation(activations: Iterable[Tensor], keep_BS: Tensor) -> Tensor:
    """Mean |a| over the kept tokens and all units, averaged over blocks; float32 scalar, 0 where no token is kept."""
    flat_N = keep_BS.flatten()  # some families walk their FFN without the batch axis
    per_block = [(a.float().flatten(0, -2).abs().mean(-1) * flat_N).sum() / flat_N.sum().clamp(min=1) for a in activations]
    return torch.stack(per_block).mean()
