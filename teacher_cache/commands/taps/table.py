"""taps: what resolves to what in a model, without running it."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from model_taps.attention import softmax_attention_layers
from model_taps.block_parts import Resolved
from model_taps.loading import LOADING_ERRORS, load_config, load_model
from model_taps.slices import tap_table
from signal_store.errors import InputError


@dataclass(frozen=True, slots=True)
class TapRow:
    """One tap of one block, in words."""

    layer: int
    tap: str
    place: str


def tap_rows(model: str, *, weights: bool = False) -> list[TapRow]:
    """Every tap of every block, and whether its attention rows can be captured; from the config alone unless `weights`."""
    if weights:
        loaded = load_model(model, what="model")
    else:
        config = load_config(model, what="model")
        try:
            with torch.device("meta"):
                loaded = AutoModelForCausalLM.from_config(config)
        except LOADING_ERRORS as error:
            raise InputError("not a causal LM", found=str(error).splitlines()[0], where=model) from error
    rows = []
    for layer, tap, found in tap_table(loaded):
        if isinstance(found, Resolved):
            place = f"{found.side} of {found.path} ({type(found.module).__name__})" + (f", {found.note}" if found.note else "")
        else:
            place = f"absent: {found.reason}"
        rows.append(TapRow(layer, tap, place))
    able = set(softmax_attention_layers(loaded))
    rows += [
        TapRow(layer, "attention_rows", "captured beside the kernel" if layer in able else "absent: no softmax attention")
        for layer in sorted({row.layer for row in rows})
    ]
    return sorted(rows, key=lambda row: row.layer)
