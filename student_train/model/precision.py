"""The precision of a run: what the recipe names, or, of `auto`, what the training device computes in natively.

bfloat16 means autocast over float32 weights. On a device without units for it a product in bfloat16 is several times slower than in
float32, so `auto` takes it only where there are some; where the recipe names it all the same, one line says what that costs.
"""

import os
from dataclasses import dataclass

import torch

from model_taps.native_dtype import emulation_warning, lacking, name_of, native_dtypes


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` of products under autocast; `reason` in words that follow a comma."""

    dtype: torch.dtype
    reason: str

    @property
    def bf16(self) -> bool:
        """Whether products are taken in bfloat16."""
        return self.dtype == torch.bfloat16

    @property
    def name(self) -> str:
        """As a recipe names it."""
        return name_of(self.dtype)


def training_device() -> torch.device:
    """The accelerator that this process trains on, by its local rank, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(found.type, rank) if found.type == "cuda" else found


def choose_precision(wanted: str, device: torch.device, begun: str | None = None) -> Precision:
    """Of `auto`, `float32` or `bfloat16`, what to train in on this device; of `auto`, a run goes on in what it was `begun` in, if
    that is native here."""
    if wanted != "auto":
        return Precision(getattr(torch, wanted), "the recipe names it")
    if begun is not None and getattr(torch, begun, None) in native_dtypes(device):
        return Precision(getattr(torch, begun), "auto: the run began in it")
    shown = native_dtypes(device).get(torch.bfloat16)
    if shown is None:
        return Precision(torch.float32, f"auto: {lacking(torch.bfloat16, device)}")
    return Precision(torch.bfloat16, f"auto: {shown}")


def emulated(precision: Precision, device: torch.device) -> str | None:
    """The warning for a precision that this device emulates, with both measured rates; None where there is nothing to say."""
    return emulation_warning(precision.dtype, device, "precision")
