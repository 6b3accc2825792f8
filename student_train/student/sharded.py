"""Whole tensors and their shards (torch's DTensor): put together from all ranks, and laid out again as a parameter is."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, put together from all ranks where it is sharded: every rank must call this."""
    value = tensor.detach()
    return value.full_tensor().cpu().clone() if isinstance(value, DTensor) else value.cpu().contiguous()


def like(value: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor, sharded as another one of its shape is; any other comes back as it is."""
    if isinstance(sharded, DTensor) and value.shape == sharded.shape:
        return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
    return value
