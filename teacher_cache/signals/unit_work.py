"""What a signal is given of a unit and of a batch: its plan, and what the teacher gave."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.teacher.batches import TeacherBatch
from teacher_cache.teacher.forward import TeacherOutputs
from teacher_cache.teacher.load import Teacher

LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Of one chunk of logits, whose tokens share one reading of the output head."""

Made = TypeVar("Made")
Places = NDArray[np.int64]
"""Of tokens, counted from the unit's first; ascending."""


@dataclass(frozen=True)
class UnitWork:
    """A unit to extract: its number and its plan."""

    number: int
    plan: UnitPlan
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, make: Callable[[UnitPlan], Made]) -> Made:
        """What a function makes of the plan; made when it is first asked for."""
        if make not in self._made:
            self._made[make] = make(self.plan)
        found: Made = self._made[make]
        return found


@dataclass(frozen=True)
class SignalBatch:
    """Segments of a unit, run through the teacher. Rows are the batch's tokens [n], in the unit's order."""

    work: UnitWork
    batch: TeacherBatch
    teacher: Teacher
    outputs: TeacherOutputs

    @property
    def unit(self) -> UnitPlan:
        """The plan of its unit."""
        return self.work.plan

    @property
    def tokens(self) -> slice:
        """Places of its tokens in the unit."""
        return self.outputs.tokens

    @property
    def device(self) -> torch.device:
        """Where the teacher's answers lie."""
        return self.outputs.hidden.device

    @property
    def num_segments(self) -> int:
        """How many segments it holds."""
        return self.batch.last - self.batch.first

    @cached_property
    def is_context(self) -> NDArray[np.bool_]:
        """bool [n]: rows that are there as context only and hold no signal."""
        return self.unit.is_context[self.tokens]

    @cached_property
    def segment_of_token(self) -> NDArray[np.int64]:
        """int64 [n]: a row's segment, counted from the batch's first."""
        return self.unit.segment_of_token[self.tokens] - self.batch.first

    @cached_property
    def labels(self) -> Tensor:
        """int64 [n]: the token that follows each row, -1 where none is stored."""
        return torch.from_numpy(self.unit.labels()[self.tokens]).to(self.device)

    def has(self, places: Places) -> NDArray[np.bool_]:
        """Which of the unit's places are in the batch."""
        found: NDArray[np.bool_] = (places >= self.tokens.start) & (places < self.tokens.stop)
        return found

    def rows_of(self, places: Places) -> Tensor:
        """int64: rows of those of the unit's places that are in the batch."""
        return torch.from_numpy(places[self.has(places)] - self.tokens.start).to(self.device)

    def captured(self, places: Places) -> NDArray[np.bool_]:
        """bool [R]: which of the attention rows that were captured are those of these places."""
        return np.isin(self.outputs.row_places, places)

    def logits(self, rows: slice | Tensor) -> Tensor:
        """float32 logits [rows, V] of some rows: of the output head, or the teacher's own where it has none that can be used."""
        if self.teacher.head is not None:
            return self.teacher.head.logits(self.outputs.hidden[rows])
        assert self.outputs.logits is not None
        return self.outputs.logits[rows]

    def over_logits(self, of: Callable[..., Tensor], *beside: Tensor) -> Tensor:
        """What a function makes of float32 logits [rows, V], for all rows [n, ...]: in chunks, so that [n, V] is never held. Of
        each of `beside` [n, ...], such as `labels`, it is given the same rows."""
        step = max(1, LOGITS_BYTES.get(self.device.type, 2**26) // (4 * self.teacher.vocab_size))
        with torch.inference_mode():
            rows = [slice(start, start + step) for start in range(0, len(self.outputs.hidden), step)]
            return torch.cat([of(self.logits(some), *(more[some] for more in beside)) for some in rows])
