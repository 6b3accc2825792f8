"""The output head of a causal LM as plain numbers: what turns the final hidden state into logits.

logits = softcap(scale · (h Wᵀ + b)), where softcap(z) = c·tanh(z/c) if the model has one. `head_error` compares that with the
model's own logits, because families scale them in ways of their own.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from signal_store.bf16_units import bf16_units
from signal_store.distribution_codec import apply_softcap


@dataclass(frozen=True, slots=True)
class OutputHead:
    """`weight` [V, d] and `bias` [V] as the model's own (not copies), `scale` and `softcap` as its config says.

    `exact_in_bf16`: weight and hidden states hold bfloat16 numbers only, whatever their dtype, so that products of bfloat16
    units summed in float32 are exact.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    exact_in_bf16: bool = False

    def to(self, device: torch.device | str) -> Self:
        """The head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def float(self) -> Self:
        """The head in float32, for many calls of `logits`; remembers whether it came from bfloat16."""
        bias = None if self.bias is None else self.bias.float()
        exact = self.exact_in_bf16 or self.weight.dtype == torch.bfloat16
        return replace(self, weight=self.weight.float(), bias=bias, exact_in_bf16=exact)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 logits [N, V] of final hidden states, with float32 sums."""
        hidden_ND = hidden_ND.to(self.weight.device)
        bias = None if self.bias is None else self.bias.float()
        bf16_is_exact = self.exact_in_bf16 or (self.weight.dtype == hidden_ND.dtype == torch.bfloat16)
        with bf16_units() if bf16_is_exact and hidden_ND.device.type == "cpu" else contextlib.nullcontext():
            logits = torch.nn.functional.linear(hidden_ND.float(), self.weight.float(), bias)
        return apply_softcap(logits if self.scale == 1 else logits * self.scale, self.softcap)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head of a model; ValueError if it has none."""
    module = model.get_output_embeddings()
    if module is None or not hasattr(module, "weight"):
        raise ValueError(f"{type(model).__name__} has no linear output head")
    config = model.config.get_text_config()
    scale = 1.0
    for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else float(value) ** power
    return OutputHead(module.weight, getattr(module, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def final_hidden(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor | None) -> Tensor:
    """What the output head reads, [B, S, d]. No cache and no attention mask: either would let packed segments see each other."""
    hidden: Tensor = model.base_model(input_ids=input_ids_BS, position_ids=position_ids_BS, use_cache=False).last_hidden_state
    return hidden


_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "norm_f")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the output head; ValueError if none is found by its customary names."""
    base = model.base_model
    for owner in (base, getattr(base, "decoder", None), getattr(base, "model", None)):
        for name in _FINAL_NORMS:
            found = getattr(owner, name, None)
            if isinstance(found, nn.Module):
                return found
    raise ValueError(f"{type(model).__name__}: no final norm among {', '.join(_FINAL_NORMS)}")


@torch.no_grad()
def head_error(model: PreTrainedModel, input_ids_BS: Tensor) -> float:
    """Largest difference between our logits and the model's own, relative to their spread."""
    own = model(input_ids=input_ids_BS, use_cache=False).logits.float()
    ours = output_head(model).logits(final_hidden(model, input_ids_BS, None).flatten(0, 1)).view_as(own)
    return float((own - ours).abs().max() / own.std().clamp(min=1e-6))
