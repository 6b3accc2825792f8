"""The global stream of rows, a function of (cache, recipe, seed): lanes dealt out row by row; and the validation split, once.

Row g of the stream is of lane (g // run_rows) % lanes. A step takes `global_batch_rows` rows; rank r of n takes its run of them,
in micro-batches of `micro_batch_rows`; worker w of m makes every m-th micro-batch. Nothing of that changes which rows a step has.
Who makes a micro-batch reads the signals of its own rows only, so that ranks whose runs lie in different lanes share no window.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.errors import InputError
from signal_store.manifest import Split
from student_train.align.aligned_cache import longest_segment
from student_train.data.aligner import Aligner, aligner_of
from student_train.data.batch import CodedBatch, LaneCursor
from student_train.data.collate import collate
from student_train.data.lanes import Lane, RowLayout, cut_rows
from student_train.data.mixing import Mixing
from student_train.data.placement import Row
from student_train.data.request import TOKENS_ONLY, SignalRequest
from student_train.data.sections import StreamSection
from student_train.importance.token_weights import TokenWeights

Cursor = dict[int, LaneCursor]
"""Where each lane goes on; one that is absent has not begun."""


@dataclass(frozen=True)
class Stream:
    """How one rank sees a cache."""

    cache: Cache
    request: SignalRequest
    config: StreamSection
    packed: bool
    rank: int = 0
    world_size: int = 1
    token_weights: TokenWeights | None = None
    """Gives the rows' importance, where the objective wants it."""

    def __post_init__(self) -> None:
        longest = longest_segment(self.cache)
        if longest > self.config.sequence_length:
            raise InputError(
                "a segment may be longer than a row",
                expected=f"stream.sequence_length of at least {longest}",
                found=self.config.sequence_length,
                where=self.cache.uri,
            )
        even = self.rows_per_rank * self.world_size == self.config.global_batch_rows
        if not even or self.rows_per_rank % self.micro_batch_rows:
            raise InputError(
                "rows do not divide evenly",
                expected="global_batch_rows a multiple of ranks × micro_batch_rows",
                found=f"{self.config.global_batch_rows} rows, {self.world_size} ranks, {self.config.micro_batch_rows} a micro-step",
            )
        if len(self.cache.units("train")):
            _ = self._mixing  # refuses names of sources that there are not

    @cached_property
    def aligner(self) -> Aligner:
        """Between the cache's tokens and the student's."""
        return aligner_of(self.cache)

    @property
    def rows_per_rank(self) -> int:
        """Rows of one step on this rank."""
        return self.config.global_batch_rows // self.world_size

    @property
    def micro_batch_rows(self) -> int:
        """Rows of a micro-batch."""
        return self.config.micro_batch_rows or self.rows_per_rank

    @property
    def micro_steps(self) -> int:
        """Micro-steps of one step: the same on every rank."""
        return self.rows_per_rank // self.micro_batch_rows

    @cached_property
    def lanes(self) -> int:
        """Lanes: as the recipe says, but each has a unit at least."""
        return min(self.config.lanes, len(self._train_units))

    @cached_property
    def _train_units(self) -> NDArray[np.int64]:
        return self.cache.units("train")

    @cached_property
    def _mixing(self) -> Mixing:
        mix = self.config.mix
        return Mixing.of(self.cache, None if mix is None else mix.weights, "tokens" if mix is None else mix.by)

    @cached_property
    def run_rows(self) -> int:
        """Rows that come from a lane before the next has its turn."""
        return max(1, self.config.global_batch_rows // max(1, self.lanes))

    def place_of(self, row: int) -> tuple[int, int]:
        """(lane, number within the lane) of a row of the global stream."""
        turn, inside = divmod(row, self.run_rows)
        return turn % self.lanes, turn // self.lanes * self.run_rows + inside

    def lane(self, number: int, at: LaneCursor) -> Lane:
        """A lane from a place on."""
        cut = RowLayout(self.config.sequence_length, self.packed, self.run_rows)
        return Lane(
            self.cache,
            self._train_units,
            self.request,
            cut,
            self._mixing,
            number,
            self.lanes,
            self.config.seed,
            self.config.window_units,
            self.aligner,
            at,
        )

    def micro_batches(self, cursor: Cursor, first_step: int, worker: int = 0, workers: int = 1) -> Iterator[CodedBatch]:
        """This rank's micro-batches from step `first_step` on, those that `worker` of `workers` makes. Endless."""
        lanes: dict[int, Lane] = {}
        micro = worker
        with ThreadPoolExecutor(max_workers=1) as ahead:
            while True:
                step, part = divmod(micro, self.micro_steps)
                first = (
                    (first_step + step) * self.config.global_batch_rows
                    + self.rank * self.rows_per_rank
                    + part * self.micro_batch_rows
                )
                rows: list[Row] = []
                after: Cursor = {}
                for row in range(first, first + self.micro_batch_rows):
                    lane, inside = self.place_of(row)
                    if lane not in lanes:
                        lanes[lane] = self.lane(lane, cursor.get(lane, LaneCursor()))
                    rows.append(lanes[lane].row(inside, ahead))
                    after[lane] = lanes[lane].at
                yield collate(
                    rows,
                    self.config.sequence_length,
                    self.request,
                    packed=self.packed,
                    cursor=after,
                    token_weights=self.token_weights,
                    aligner=self.aligner,
                )
                micro += workers

    def once(self, split: Split, request: SignalRequest = TOKENS_ONLY, max_tokens: int | None = None) -> Iterator[CodedBatch]:
        """A split in order, once, dealt out to the ranks row by row; filler rows at the end."""
        per_batch = self.micro_batch_rows * self.world_size
        pending: list[Row] = []
        for row in self._rows_once(split, request, max_tokens):
            pending.append(row)
            if len(pending) == per_batch:
                yield self._dealt(pending, request)
                pending = []
        if pending:
            yield self._dealt([*pending, *([] for _ in range(per_batch - len(pending)))], request)

    def _rows_once(self, split: Split, request: SignalRequest, max_tokens: int | None) -> Iterator[Row]:
        cut = RowLayout(self.config.sequence_length, self.packed, self.run_rows)
        tokens = 0
        for unit in self.cache.units(split):
            (loaded,) = request.load(self.cache, [int(unit)])
            lengths = self.aligner.lengths(loaded)
            for row in cut_rows([(loaded, segment) for segment in np.flatnonzero(lengths).tolist()], cut, 0, self.aligner):
                if max_tokens is not None and tokens >= max_tokens:
                    return
                yield row
                tokens += sum(int(lengths[segment]) for _, segment in row)

    def _dealt(self, rows: Sequence[Row], request: SignalRequest) -> CodedBatch:
        mine = rows[self.rank :: self.world_size]
        return collate(mine, self.config.sequence_length, request, packed=self.packed, cursor={}, aligner=self.aligner)
