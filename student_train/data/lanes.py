"""A lane of the stream: the units whose place in the epoch's order falls to it, window after window, endless.

A window's units are shuffled together and packed into rows; rows are shuffled by key. A lane knows the lengths of its segments
only, until a row's codes are asked for: skipping rows of other ranks or workers reads no signal.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model_taps.packing import best_fit
from signal_store.cache import Cache
from signal_store.errors import InputError
from student_train.data.aligner import Aligner
from student_train.data.batch import LaneCursor
from student_train.data.mixing import Mixing
from student_train.data.order import key_of, permuted, shuffled
from student_train.data.placement import Row
from student_train.data.request import SignalRequest
from student_train.data.unit import UnitReader

EMPTY_EPOCHS = 8
"""A lane that has no row in so many epochs never will."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How segments become rows. `packed`: several a row; else one, and rows of like length next to each other, `bucket_rows` of
    them at a time."""

    sequence_length: int
    packed: bool
    bucket_rows: int


def cut_rows(segments: Sequence[tuple[UnitReader, int]], cut: RowLayout, key: int, aligner: Aligner) -> list[Row]:
    """Segments in rows of at most `sequence_length`, shuffled by key: best fit, or one a row in shuffled buckets of like length."""
    lengths = [int(aligner.lengths(unit)[segment]) for unit, segment in segments]
    if cut.packed:
        numbers = best_fit(lengths, cut.sequence_length)
        return [[segments[i] for i in numbers[row]] for row in shuffled(len(numbers), key)]
    order = sorted(shuffled(len(segments), key).tolist(), key=lambda i: lengths[i])  # stable: equal lengths stay shuffled
    buckets = [order[first : first + cut.bucket_rows] for first in range(0, len(order), cut.bucket_rows)]
    return [[segments[i]] for bucket in shuffled(len(buckets), key) for i in buckets[bucket]]


@dataclass(slots=True)
class Lane:
    """`number` of `count` lanes, standing at `at`. Only `row` moves it, forward."""

    cache: Cache
    train_units: NDArray[np.int64]
    request: SignalRequest
    cut: RowLayout
    mixing: Mixing
    number: int
    count: int
    seed: int
    window_units: int
    aligner: Aligner
    at: LaneCursor
    _rows: list[Row] = field(default_factory=list)
    _window: tuple[int, int] | None = None
    _next: tuple[tuple[int, int], Future[list[UnitReader]]] | None = None

    def row(self, number: int, ahead: ThreadPoolExecutor | None = None) -> Row:
        """The lane's row `number`, counted from the beginning of time; not before where it stands. `ahead` reads the next
        window."""
        empty = 0
        while True:
            epoch, window = self.at.epoch, self.at.window
            if self._window != (epoch, window):
                self._rows, self._window = self._cut(epoch, window), (epoch, window)
            inside = self.at.row + number - self.at.rows
            assert inside >= self.at.row, "a lane goes forward only"
            if inside < len(self._rows):
                self.at = LaneCursor(number + 1, epoch, window, inside + 1)
                if ahead is not None:
                    self._read_ahead(ahead)
                return self._rows[inside]
            last = window + 1 >= self._windows
            empty = 0 if self._rows else empty + 1
            if empty > EMPTY_EPOCHS * self._windows:
                raise InputError("the mix leaves a lane without text", expected="fewer lanes", found=self.count, where="stream.mix")
            behind = self.at.rows + len(self._rows) - self.at.row
            self.at = LaneCursor(behind, epoch + last, 0 if last else window + 1, 0)

    @property
    def _places(self) -> range:
        return range(self.number, len(self.train_units), self.count)

    @property
    def _windows(self) -> int:
        return -(-len(self._places) // self.window_units)

    def _units(self, epoch: int, window: int) -> list[int]:
        units = self.train_units
        key = key_of(self.seed, epoch)
        places = self._places[window * self.window_units : (window + 1) * self.window_units]
        return [int(units[permuted(place, len(units), key)]) for place in places]

    def _cut(self, epoch: int, window: int) -> list[Row]:
        if self._next is not None and self._next[0] == (epoch, window):
            loaded = self._next[1].result()
        else:
            loaded = self.request.load(self.cache, self._units(epoch, window))
        self._next = None
        segments = [
            (unit, segment)
            for unit in loaded
            for segment in np.flatnonzero(self.aligner.lengths(unit)).tolist()
            for _ in range(self.mixing.copies(unit, segment, key_of(self.seed, epoch)))
        ]
        return cut_rows(segments, self.cut, key_of(self.seed, epoch, window, self.number), self.aligner)

    def _read_ahead(self, ahead: ThreadPoolExecutor) -> None:
        if self._next is None:
            last = self.at.window + 1 >= self._windows
            following = (self.at.epoch + last, 0 if last else self.at.window + 1)
            units = self._units(*following)
            self._next = (following, ahead.submit(_read_whole, self.cache, units, self.request))


def _read_whole(cache: Cache, units: Sequence[int], request: SignalRequest) -> list[UnitReader]:
    loaded = request.load(cache, units)
    for unit in loaded:
        unit.read_all()
    return loaded
