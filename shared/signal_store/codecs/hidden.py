"""Hidden states as int8 or float16 in units of one scale a row.

Full width: channels are centred and divided by their calibrated spread before the row's scale is taken, so that a massive
channel does not ruin the others. PCA: coordinates along the principal directions, one step for all of a row; only massive
channels are divided down first. float16 is scaled too: residual streams exceed 65,504.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIMIT = 127
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True, slots=True)
class HiddenCodec:
    """`mean` [D]; `spread` [D], by which channels are divided; `basis` [D, r] orthonormal columns, or None for the full width;
    `bits` 8 or 16 of a value."""

    mean: Tensor
    spread: Tensor
    basis: Tensor | None
    bits: int = 8

    @classmethod
    def plain(cls, width: int) -> Self:
        """No calibration: each row in int8, by its largest magnitude."""
        return cls(torch.zeros(width), torch.ones(width), None)

    def to_arrays(self, group: str) -> dict[str, NDArray[np.float32]]:
        """The constants as float32 arrays by name, for the calibration file."""
        parts = {"mean": self.mean, "spread": self.spread, **({} if self.basis is None else {"basis": self.basis})}
        return {f"{group}/{name}": part.cpu().float().numpy() for name, part in parts.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float32]], group: str, bits: int) -> Self:
        """The inverse of `to_arrays`."""
        parts = {name: arrays.get(f"{group}/{name}") for name in ("mean", "spread", "basis")}
        tensors = {name: None if part is None else torch.from_numpy(np.array(part)) for name, part in parts.items()}
        mean, spread = tensors["mean"], tensors["spread"]
        assert mean is not None
        assert spread is not None
        return cls(mean, spread, tensors["basis"], bits)

    def to(self, device: torch.device | str) -> Self:
        """The constants on a device."""
        basis = None if self.basis is None else self.basis.to(device)
        return replace(self, mean=self.mean.to(device), spread=self.spread.to(device), basis=basis)

    def encode(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """int8 or float16 values [N, D or r] and float32 scale [N]."""
        centred = (hidden_ND.float() - self.mean) / self.spread
        coordinates = centred if self.basis is None else centred @ self.basis
        scale_N = coordinates.abs().amax(1).clamp(min=SMALLEST_SCALE * LIMIT) / LIMIT
        if self.bits == 16:
            return (coordinates / scale_N[:, None]).to(torch.float16), scale_N
        return (coordinates / scale_N[:, None]).round().clamp(-LIMIT, LIMIT).to(torch.int8), scale_N

    def decode(self, values: Tensor, scale_N: Tensor) -> Tensor:
        """float32 hidden states [N, D]; error at most scale / 2 per coordinate (times spread), plus what PCA left out."""
        coordinates = values.float() * scale_N[:, None]
        centred = coordinates if self.basis is None else coordinates @ self.basis.T
        return centred * self.spread + self.mean
