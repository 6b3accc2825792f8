"""What travels from the cache to a training step: tokens and codes, nothing decoded.

Legend: B rows, S tokens a row, N rows of the distribution that count, P sampled hidden states, R keyword rows, E their entries.
`flat` positions count b * S + s.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self

import torch
from torch import Tensor

from signal_store.codecs.distribution import DistributionCodes
from signal_store.signals import Tap

IGNORE = -100
"""A label that is not stored."""


@dataclass(frozen=True, slots=True)
class HiddenCodes:
    """Sampled outputs of one teacher layer: int8 `values` [P, width or rank], float32 `scale` [P]."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class AttentionCodes:
    """Keyword rows of one teacher layer, entries end to end: uint8 `weights` [E, H]; `columns` int32 [E, H] and float16
    `residual` [R, H] where only the heaviest columns are kept, else None."""

    weights: Tensor
    columns: Tensor | None
    residual: Tensor | None


@dataclass(frozen=True, slots=True)
class ReplayCodes:
    """Paths of sampled tokens: `flat` int64 [P] where they are, `labels` int64 [P] what follows them, int8 `values` [P, K, width]
    in units of `scale` float32 [P], losses `nll` float32 [P, K + 1] in nats."""

    flat: Tensor
    labels: Tensor
    values: Tensor
    scale: Tensor
    nll: Tensor


@dataclass(frozen=True, slots=True)
class EvidenceCodes:
    """Sentences of questions: `segment` int64 [E] number in the batch, `ranges` int64 [E, 2] first token and the one after the
    last, counted from the segment's first; `shares` float16 [E] by teacher layer."""

    segment: Tensor
    ranges: Tensor
    shares: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class CoverageCodes:
    """Key words: `segment` int64 [W] number in the batch, `token` int64 [W], `probability` float16 [W] that it is said."""

    segment: Tensor
    token: Tensor
    probability: Tensor


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
    counts; `labels` int64 [N], IGNORE where the label is not stored; `distribution` their codes or None; `importance` float32
    [N] their weights and `types` uint8 [N] of the tokens that they predict (`signal_store.format.roles.TOKEN_TYPES`), or None.
    `hidden_flat` [P] and `hidden` by tap and teacher layer. `row_batch`, `row_query`, `row_first`, `row_length` int64 [R] (length:
    stored entries), `row_keyword` bool [R] (False: a token before a keyword) and `attention` by teacher layer. `statistics`
    float16 [segments, H, 4] by teacher layer, `sparsity` float16 [segments, layers, 2] of FFNs or None. `replay` paths, `evidence`
    and `coverage` or None. `segments`: which segments are in it, `sources` their sources' numbers, `segment_rows` how many of the
    N rows each has, `hidden_rows` how many of the P states, `context_only` how many of its first tokens are there as context only.
    `cursor`: where the lanes that it drew from go on.
    """

    input_ids: Tensor
    position_ids: Tensor
    real: Tensor
    flat: Tensor
    labels: Tensor
    distribution: DistributionCodes | None
    importance: Tensor | None
    types: Tensor | None
    hidden_flat: Tensor
    hidden: dict[tuple[Tap, int], HiddenCodes]
    row_batch: Tensor
    row_query: Tensor
    row_first: Tensor
    row_length: Tensor
    row_keyword: Tensor
    attention: dict[int, AttentionCodes]
    statistics: dict[int, Tensor]
    sparsity: Tensor | None
    replay: ReplayCodes | None
    evidence: EvidenceCodes | None
    coverage: CoverageCodes | None
    segments: tuple[int, ...]
    sources: tuple[int, ...]
    segment_rows: tuple[int, ...]
    hidden_rows: tuple[int, ...]
    context_only: tuple[int, ...]
    packed: bool
    cursor: dict[int, LaneCursor]

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
