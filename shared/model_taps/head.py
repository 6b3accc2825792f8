"""The output head of a causal LM as plain numbers: what turns the final hidden state into logits.

logits = softcap(scale · (h Wᵀ + b)), where softcap(z) = c·tanh(z/c) if the model has one. `head_error` compares that with the
model's own logits, because families scale them in ways of their own.
"""

import contextlib
import inspect
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.blocks import model_body, text_decoder, unsupported
from model_taps.evaluating import evaluating
from signal_store.codecs.bf16_units import bf16_units
from signal_store.codecs.distribution import apply_softcap


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


_SCALES = (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1))
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head of a model. InputError if it has none, or one that is not linear."""
    module = model.get_output_embeddings()
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise unsupported(model, "no linear output head", "none" if module is None else type(module).__name__)
    config = model.config.get_text_config(decoder=True)
    scale = 1.0
    for name, power in _SCALES:
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else float(value) ** power
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    return OutputHead(module.weight, getattr(module, "bias", None), scale, softcap)


def accepts(module: nn.Module, name: str) -> bool:
    """Whether a module's forward pass takes an argument by this name; to take any and hand it on does not count."""
    return name in inspect.signature(module.forward).parameters


def _no_cache(module: nn.Module) -> dict[str, object]:
    """Options that keep a forward pass from making a cache."""
    parameters = inspect.signature(module.forward).parameters
    hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": False} if "use_cache" in parameters or hands_on else {}


def final_hidden(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor | None) -> Tensor:
    """What the output head reads, [B, S, d]. No cache and no attention mask: either would let packed segments see each other.

    InputError where the family gives no such thing.
    """
    body = model_body(model)
    options: dict[str, object] = _no_cache(body)
    if position_ids_BS is not None:
        options["position_ids"] = position_ids_BS
    hidden = getattr(body(input_ids=input_ids_BS, **options), "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.shape[:2] != input_ids_BS.shape:
        found = tuple(hidden.shape) if isinstance(hidden, Tensor) else "none"
        raise unsupported(model, f"{type(body).__name__} gives no final hidden states", found)
    return hidden


_FINAL_NORMS = (
    "norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "norm_f", "embedding_norm", "ln_out", "out_norm",
    "layer_norm",
)  # fmt: skip


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the output head; InputError if none is found by its customary names."""
    body = text_decoder(model)
    for owner in (body, getattr(body, "decoder", None), getattr(body, "model", None), getattr(body, "transformer", None)):
        for name in _FINAL_NORMS:
            found = getattr(owner, name, None)
            if isinstance(found, nn.Module):
                return found
    raise unsupported(model, "no final norm", f"none of {', '.join(_FINAL_NORMS)} in {type(body).__name__}")


MAX_HEAD_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def refuse_another_head(model: PreTrainedModel, vocab_size: int, what: str) -> None:
    """InputError where the model's own logits are not those of its linear head."""
    device = next(model.parameters()).device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    with evaluating(model):
        found = head_error(model, torch.arange(min(vocab_size, 16), device=device)[None])
    if found > MAX_HEAD_ERROR.get(dtype, 5e-2):
        raise unsupported(model, f"the {what}'s logits are not its linear head's", f"a relative difference of {found:.2g}")


@torch.no_grad()
def head_error(model: PreTrainedModel, input_ids_BS: Tensor) -> float:
    """Largest difference between our logits and the model's own, relative to their spread."""
    own = own_logits(model, input_ids_BS)
    ours = output_head(model).logits(final_hidden(model, input_ids_BS, None).flatten(0, 1)).view_as(own)
    return float((own - ours).abs().max() / own.std().clamp(min=1e-6))


def own_logits(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor | None = None) -> Tensor:
    """float32 logits [B, S, V] as the model itself gives them."""
    options: dict[str, object] = _no_cache(model)
    if position_ids_BS is not None:
        options["position_ids"] = position_ids_BS
    logits: Tensor = model(input_ids=input_ids_BS, **options).logits.float()
    return logits
