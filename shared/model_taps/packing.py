"""Several segments in one row: how they are laid out. Whether a model keeps them apart is for `model_taps.neighbours` to find.

A packed row needs restarting `position_ids`, no attention mask and `use_cache=False`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Forward = Literal["packed", "padded", "alone"]
"""Several segments a row; one a row, rows filled up on the right; or one segment a forward pass."""


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


def position_ids(lengths: Sequence[int], width: int) -> Tensor:
    """int64 [width]: 0, 1, ... for each segment in turn. Filler restarts too, again and again: it must not reach a position that
    no segment of the row has, for some families choose by the largest."""
    filler = torch.arange(width - sum(lengths)) % max([1, *lengths])
    return torch.cat([*(torch.arange(n) for n in lengths), filler])
