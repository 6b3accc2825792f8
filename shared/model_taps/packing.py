"""Several segments in one row: how they are laid out, and whether a model keeps them apart.

A packed row needs restarting `position_ids`, no attention mask and `use_cache=False`; families with recurrent state leak all
the same. The probe runs two segments together and apart and compares.
"""

import inspect
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.head import final_hidden

Forward = Literal["packed", "padded"]
MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: rows of item numbers whose lengths sum to at most `capacity`. Deterministic; O(n · rows)."""
    rows: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [(room, row) for row, room in enumerate(free) if room >= lengths[item]]
        if fits:
            row = min(fits)[1]
            rows[row].append(item)
            free[row] -= lengths[item]
        else:
            rows.append([item])
            free.append(capacity - lengths[item])
    return rows


@torch.no_grad()
def packing_error(model: PreTrainedModel, vocab_size: int) -> float:
    """Largest difference between packed and separate final hidden states of two short segments, relative to their spread."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocab_size, (1, n), generator=generator).to(device) for n in (7, 9))
    packed_ids = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None].to(device)
    was_training = model.training
    model.eval()
    packed = final_hidden(model, packed_ids, positions)
    separate = torch.cat([final_hidden(model, first, None), final_hidden(model, second, None)], 1)
    model.train(was_training)
    return float((packed - separate).abs().max().float() / separate.float().std().clamp(min=1e-6))


def probe(model: PreTrainedModel, vocab_size: int) -> Forward:
    """`packed` where the model keeps segments of a row apart within its dtype's error, else `padded`."""
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "padded"
    return "packed" if packing_error(model, vocab_size) <= MAX_RELATIVE_ERROR.get(model.dtype, 5e-2) else "padded"


def position_ids(lengths: Sequence[int], width: int) -> Tensor:
    """int64 [width]: 0, 1, ... for each segment in turn; filler restarts as one more segment."""
    parts = [torch.arange(n) for n in lengths]
    filler = width - sum(lengths)
    return torch.cat([*parts, torch.arange(filler)]) if filler else torch.cat(parts)
