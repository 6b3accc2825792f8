"""Hidden states as int8 with one scale a row.

Full width: channels are centred and divided by their calibrated spread before the row's scale is taken, so that a massive
channel does not ruin the others. PCA: coordinates along the principal directions, one step for all of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIMIT = 127


@dataclass(frozen=True, slots=True)
class HiddenCodec:
    """`mean` [D]; `spread` [D], ones under PCA; `basis` [D, r] orthonormal columns, or None for the full width."""

    mean: Tensor
    spread: Tensor
    basis: Tensor | None

    def to_arrays(self, layer: int) -> dict[str, NDArray[np.float32]]:
        """The constants as float32 arrays by name, for the calibration file."""
        parts = {"mean": self.mean, "spread": self.spread, **({} if self.basis is None else {"basis": self.basis})}
        return {f"hidden/{layer}/{name}": part.cpu().float().numpy() for name, part in parts.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float32]], layer: int) -> Self:
        """The inverse of `to_arrays`."""
        parts = {name: arrays.get(f"hidden/{layer}/{name}") for name in ("mean", "spread", "basis")}
        tensors = {name: None if part is None else torch.from_numpy(np.array(part)) for name, part in parts.items()}
        mean, spread = tensors["mean"], tensors["spread"]
        assert mean is not None
        assert spread is not None
        return cls(mean, spread, tensors["basis"])

    def to(self, device: torch.device | str) -> Self:
        """The constants on a device."""
        return type(self)(self.mean.to(device), self.spread.to(device), None if self.basis is None else self.basis.to(device))

    def encode(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """int8 values [N, D or r] and float32 scale [N]."""
        centred = (hidden_ND.float() - self.mean) / self.spread
        coordinates = centred if self.basis is None else centred @ self.basis
        scale_N = coordinates.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LIMIT
        return (coordinates / scale_N[:, None]).round().clamp(-LIMIT, LIMIT).to(torch.int8), scale_N

    def decode(self, values: Tensor, scale_N: Tensor) -> Tensor:
        """float32 hidden states [N, D]; error at most scale / 2 per coordinate (times spread), plus what PCA left out."""
        coordinates = values.float() * scale_N[:, None]
        centred = coordinates if self.basis is None else coordinates @ self.basis.T
        return centred * self.spread + self.mean
