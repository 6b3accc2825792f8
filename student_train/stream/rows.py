"""The global stream of rows: windows of shuffled units, packed, endless; and the validation split, once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model_taps.packing import best_fit
from signal_store.cache import Cache
from signal_store.errors import InputError
from signal_store.manifest import Split
from student_train.batch import CodedBatch, Cursor
from student_train.recipe import StreamSection
from student_train.stream.collate import collate
from student_train.stream.order import key_of, permuted, shuffled
from student_train.stream.reader import LoadedUnit, Needs, load_window

Row = list[tuple[LoadedUnit, int]]


def pack_rows(units: Sequence[LoadedUnit], row_tokens: int, *, packed: bool) -> list[Row]:
    """All segments of a window in rows of at most `row_tokens`: best fit, or one segment a row."""
    segments = [(unit, segment) for unit in units for segment in range(len(unit.segments["length"]))]
    lengths = [int(unit.segments["length"][segment]) for unit, segment in segments]
    numbers = best_fit(lengths, row_tokens) if packed else [[i] for i in range(len(segments))]
    return [[segments[i] for i in row] for row in numbers]


@dataclass(frozen=True, slots=True)
class Stream:
    """How one rank sees a cache. A step takes `rows_per_step` rows of the global stream; rank r of n takes its run of
    neighbouring rows, in micro-batches of `micro_rows`."""

    cache: Cache
    needs: Needs
    config: StreamSection
    packed: bool
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        longest = self.cache.manifest.plan.context
        if longest > self.config.row_tokens:
            raise InputError(
                "a segment may be longer than a row",
                expected=f"stream.row_tokens of at least {longest}",
                found=self.config.row_tokens,
                where=self.cache.uri,
            )
        even = self.rows_per_rank * self.world_size == self.config.rows_per_step
        if not even or self.rows_per_rank % (self.config.micro_rows or self.rows_per_rank):
            raise InputError(
                "rows do not divide evenly",
                expected="rows_per_step a multiple of ranks × micro_rows",
                found=f"{self.config.rows_per_step} rows, {self.world_size} ranks, {self.config.micro_rows} a micro-step",
            )

    @property
    def rows_per_rank(self) -> int:
        """Rows of one step on this rank."""
        return self.config.rows_per_step // self.world_size

    @property
    def micro_steps(self) -> int:
        """Micro-steps of one step: the same on every rank."""
        return self.rows_per_rank // (self.config.micro_rows or self.rows_per_rank)

    def window_count(self) -> int:
        """Windows of an epoch."""
        return -(-len(self.cache.units("train")) // self.config.window_units)

    def window_rows(self, epoch: int, window: int) -> list[Row]:
        """The shuffled rows of one window: a function of the seed and its place."""
        units = self.cache.units("train")
        if not len(units):
            raise InputError("the cache has no train split", expected="a source with split: train", where=self.cache.uri)
        key = key_of(self.config.seed, epoch)
        first = window * self.config.window_units
        places = range(first, min(first + self.config.window_units, len(units)))
        loaded = load_window(self.cache, [int(units[permuted(p, len(units), key)]) for p in places], self.needs)
        rows = pack_rows(loaded, self.config.row_tokens, packed=self.packed)
        return [rows[i] for i in shuffled(len(rows), key_of(self.config.seed, epoch, window))]

    def rows_from(self, cursor: Cursor) -> Iterator[tuple[Row, Cursor]]:
        """Every row of the global stream from a place on, with the place after it. Endless: epochs follow each other."""
        epoch, window, skip = cursor.epoch, cursor.window, cursor.row
        windows = self.window_count()
        while True:
            rows = self.window_rows(epoch, window)
            for number in range(skip, len(rows)):
                yield rows[number], Cursor(epoch, window, number + 1)
            window, skip = window + 1, 0
            if window >= windows:
                epoch, window = epoch + 1, 0

    def micro_batches(self, cursor: Cursor) -> Iterator[CodedBatch]:
        """This rank's micro-batches from a place on; `micro_steps` of them make a step. Endless."""
        rows = self.rows_from(cursor)
        per_micro = self.rows_per_rank // self.micro_steps
        while True:
            step: list[Row] = []
            for _ in range(self.config.rows_per_step):
                row, after = next(rows)
                step.append(row)
            mine = step[self.rank * self.rows_per_rank : (self.rank + 1) * self.rows_per_rank]
            for first in range(0, len(mine), per_micro):
                yield collate(mine[first : first + per_micro], self.config.row_tokens, self.needs, packed=self.packed, cursor=after)

    def once(self, split: Split, max_tokens: int | None) -> Iterator[CodedBatch]:
        """A split in order, once, dealt out to the ranks row by row; filler rows at the end. No signal but tokens is read."""
        needs = Needs(distribution=False, hidden=(), attention=())
        per_batch = self.rows_per_rank // self.micro_steps * self.world_size
        pending: list[Row] = []
        tokens = 0
        for unit in self.cache.units(split):
            if max_tokens is not None and tokens >= max_tokens:
                break
            for row in pack_rows(load_window(self.cache, [int(unit)], needs), self.config.row_tokens, packed=self.packed):
                if max_tokens is not None and tokens >= max_tokens:
                    break
                pending.append(row)
                tokens += sum(int(loaded.segments["length"][segment]) for loaded, segment in row)
        for first in range(0, len(pending), per_batch):
            rows = pending[first : first + per_batch]
            rows += [[] for _ in range(per_batch - len(rows))]
            mine = rows[self.rank :: self.world_size]
            yield collate(mine, self.config.row_tokens, needs, packed=self.packed, cursor=Cursor())
