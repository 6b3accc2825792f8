"""A micro-batch on its way to the device: all its tensors in one buffer.

A worker process hands over one piece of shared memory instead of twenty, pinning is one allocation, and the copy to a GPU is one.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from student_train.data.batch import CodedBatch

ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the buffer."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, data: Tensor) -> Tensor:
        """The tensor, a view of the buffer."""
        return data[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """`data` uint8, all bytes of the micro-batch; `contents` the batch with a `Place` where each tensor was."""

    data: Tensor
    contents: CodedBatch

    @classmethod
    def of(cls, batch: CodedBatch) -> Self:
        """Pack a micro-batch."""
        packed: list[tuple[Place, Tensor]] = []
        size = 0

        def reserve(tensor: Tensor) -> Place:
            nonlocal size
            place = Place(size, size + tensor.numel() * tensor.element_size(), tensor.dtype, tensor.shape)
            size = math.ceil(place.stop / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            packed.append((place, tensor))
            return place

        contents = batch.mapped(reserve, Tensor)
        data = torch.empty(size, dtype=torch.uint8)
        for place, tensor in packed:
            place.of(data).copy_(tensor)
        return cls(data, contents)

    @property
    def batch(self) -> CodedBatch:
        """The micro-batch where it lies."""
        return self.to(self.data.device)

    def to(self, device: torch.device) -> CodedBatch:
        """The micro-batch on a device, copied in one piece and without blocking."""
        data = self.data.to(device, non_blocking=True)
        return self.contents.mapped(lambda place: place.of(data), Place)

    def pin_memory(self) -> Self:
        """In pinned memory, from where a GPU copies without waiting."""
        return type(self)(self.data.pin_memory(), self.contents)
