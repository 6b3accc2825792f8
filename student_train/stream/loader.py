"""The one file that knows torchdata: prefetches micro-batches in a worker process. The state is ours, a Cursor in each batch."""

import warnings
from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from student_train.batch import CodedBatch, Cursor
from student_train.stream.rows import Stream


class _MicroBatches(IterableDataset[CodedBatch]):
    def __init__(self, stream: Stream, cursor: Cursor) -> None:
        self._stream, self._cursor = stream, cursor

    def __iter__(self) -> Iterator[CodedBatch]:
        info = get_worker_info()
        assert info is None or info.num_workers == 1
        return self._stream.micro_batches(self._cursor)


def load(stream: Stream, cursor: Cursor, *, pin_memory: bool) -> Iterator[CodedBatch]:
    """Endless micro-batches from a place on. With `workers: 1` one process reads ahead; with 0 the reading is in line."""
    workers = min(1, stream.config.workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        loader: StatefulDataLoader[CodedBatch] = StatefulDataLoader(
            _MicroBatches(stream, cursor),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            pin_memory=pin_memory,
        )
        return iter(loader)
