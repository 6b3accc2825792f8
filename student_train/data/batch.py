"""What travels from the cache to a training step: tokens and codes, nothing decoded.

Legend: B rows, S tokens a row, N rows of the distribution that count. `flat` positions count b * S + s.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from student_train.data.part import Part

PartKind = TypeVar("PartKind", bound=Part)


@dataclass(frozen=True, slots=True)
class LaneCursor:
    """A place in a lane of the stream: `rows` of it were taken; the next is row `row` of window `window` of epoch `epoch`."""

    rows: int = 0
    epoch: int = 0
    window: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class CodedBatch:
    """One micro-batch.

    `input_ids`, `position_ids` int64 [B, S]; `real` bool [B, S], False on filler. `flat` int64 [N]: rows whose distribution
    counts; `labels` int64 [N], IGNORE where the label is not stored; `importance` float32 [N] their weights, or None. `segments`:
    which segments are in it, `sources` their sources' numbers, `segment_rows` how many of the N rows each has, `context_only` how
    many of its first tokens, as the cache counts them, are there as context only. `cursor`: where the lanes that it drew from go
    on. `signals`: by class, the part of each signal that was asked for; none where there is no segment.
    """

    input_ids: Tensor
    position_ids: Tensor
    real: Tensor
    flat: Tensor
    labels: Tensor
    importance: Tensor | None
    segments: tuple[int, ...]
    sources: tuple[int, ...]
    segment_rows: tuple[int, ...]
    context_only: tuple[int, ...]
    packed: bool
    cursor: dict[int, LaneCursor]
    signals: dict[type[Part], Part]

    def part(self, kind: type[PartKind]) -> PartKind | None:
        """What it holds of a signal; None where that was not asked for, or the batch has no segment."""
        found = self.signals.get(kind)
        return found if isinstance(found, kind) else None

    def with_parts(self, *parts: Part) -> Self:
        """The batch with these in the place of those of their classes."""
        return replace(self, signals={**self.signals, **{type(part): part for part in parts}})

    def mapped(self, change: Callable[[Any], Any], kind: type) -> Self:
        """The batch with everything of this kind in it changed."""
        return type(self)(**{f.name: _mapped(getattr(self, f.name), change, kind) for f in fields(self)})

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        return self.mapped(lambda tensor: tensor.to(device), Tensor)


def _mapped(value: Any, change: Callable[[Any], Any], kind: type) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change, kind) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type | LaneCursor):
        return type(value)(**{f.name: _mapped(getattr(value, f.name), change, kind) for f in fields(value)})
    return value
