"""What travels from the cache to a training step: tokens and codes, nothing decoded.

Legend: B rows, S tokens a row, N rows of the distribution that count. `flat` positions count b * S + s.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from model_taps.slices import State
from signal_store.codecs.distribution import DistributionCodes
from student_train.data.signals.attention import AttentionCodes as AttentionCodes
from student_train.data.signals.attention import AttentionPart
from student_train.data.signals.base import Part
from student_train.data.signals.coverage import CoveragePart
from student_train.data.signals.distribution import DistributionPart
from student_train.data.signals.evidence import EvidencePart
from student_train.data.signals.hidden import HiddenCodes as HiddenCodes
from student_train.data.signals.hidden import HiddenPart
from student_train.data.signals.replay import ReplayPart
from student_train.data.signals.stats import StatsPart
from student_train.data.signals.tags import TagsPart
from student_train.data.unit import IGNORE as IGNORE

Kind = TypeVar("Kind", bound=Part)
CoverageCodes = CoveragePart
"""An old name."""


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
    many of its first tokens are there as context only. `cursor`: where the lanes that it drew from go on. `signals`: by class, the
    part of each signal that was asked for; none where there is no segment.
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

    def part(self, kind: type[Kind]) -> Kind | None:
        """What it holds of a signal; None where that was not asked for, or the batch has no segment."""
        found = self.signals.get(kind)
        return found if isinstance(found, kind) else None

    def with_parts(self, *parts: Part) -> Self:
        """The batch with these in the place of those of their classes."""
        return replace(self, signals={**self.signals, **{type(part): part for part in parts}})

    # Below: what the losses knew parts by, until they take them by class.

    @property
    def distribution(self) -> DistributionCodes | None:
        """Codes of the N rows."""
        part = self.part(DistributionPart)
        return None if part is None else part.codes

    @property
    def types(self) -> Tensor | None:
        """See `TagsPart`."""
        part = self.part(TagsPart)
        return None if part is None else part.types

    @property
    def hidden_flat(self) -> Tensor:
        """See `HiddenPart`."""
        part = self.part(HiddenPart)
        return self.flat[:0] if part is None else part.flat

    @property
    def hidden(self) -> dict[State, HiddenCodes]:
        """See `HiddenPart`."""
        part = self.part(HiddenPart)
        return {} if part is None else part.states

    @property
    def hidden_rows(self) -> tuple[int, ...]:
        """See `HiddenPart`."""
        part = self.part(HiddenPart)
        return () if part is None else part.segment_rows

    @property
    def row_batch(self) -> Tensor:
        """See `AttentionPart`."""
        part = self.part(AttentionPart)
        return self.flat[:0] if part is None else part.batch

    @property
    def row_query(self) -> Tensor:
        """See `AttentionPart`."""
        part = self.part(AttentionPart)
        return self.flat[:0] if part is None else part.query

    @property
    def row_first(self) -> Tensor:
        """See `AttentionPart`."""
        part = self.part(AttentionPart)
        return self.flat[:0] if part is None else part.first

    @property
    def row_length(self) -> Tensor:
        """See `AttentionPart`."""
        part = self.part(AttentionPart)
        return self.flat[:0] if part is None else part.length

    @property
    def row_keyword(self) -> Tensor:
        """See `AttentionPart`."""
        part = self.part(AttentionPart)
        return self.flat[:0].bool() if part is None else part.keyword

    @property
    def attention(self) -> dict[int, AttentionCodes]:
        """See `AttentionPart`."""
        part = self.part(AttentionPart)
        return {} if part is None else part.layers

    @property
    def statistics(self) -> dict[int, Tensor]:
        """See `StatsPart`."""
        part = self.part(StatsPart)
        return {} if part is None else part.attention

    @property
    def sparsity(self) -> Tensor | None:
        """See `StatsPart`."""
        part = self.part(StatsPart)
        return None if part is None else part.ffn

    @property
    def replay(self) -> ReplayPart | None:
        """See `ReplayPart`."""
        return self.part(ReplayPart)

    @property
    def evidence(self) -> EvidencePart | None:
        """See `EvidencePart`."""
        return self.part(EvidencePart)

    @property
    def coverage(self) -> CoveragePart | None:
        """See `CoveragePart`."""
        return self.part(CoveragePart)

    # Above: the old names.

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
