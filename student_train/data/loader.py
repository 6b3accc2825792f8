"""The one file that knows torchdata: makes micro-batches in worker processes.

Its snapshots are off: one holds the states of the workers of one rank, and only as many workers go on from it, where the cursor in
each batch goes on with any number of ranks and workers.
"""

import sys
import warnings
from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from signal_store.errors import SignalStoreError
from signal_store.io.local import LocalObjects
from student_train.align.aligned_cache import AlignedCache
from student_train.data.packed_batch import PackedBatch
from student_train.data.stream import Cursor, Stream


class _MicroBatches(IterableDataset[PackedBatch]):
    def __init__(self, stream: Stream, cursor: Cursor, first_step: int) -> None:
        self._stream, self._cursor, self._first_step = stream, cursor, first_step

    def __iter__(self) -> Iterator[PackedBatch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return map(PackedBatch.of, self._stream.micro_batches(self._cursor, self._first_step, worker, workers))


def load(stream: Stream, cursor: Cursor, first_step: int, *, pin_memory: bool) -> Iterator[PackedBatch]:
    """Endless micro-batches from a step on, the same whatever the number of worker processes; with 0 the reading is in line.

    Workers of a local cache are forked, which costs nothing; of a remote one they are spawned, and open it anew: the threads of its
    client would not survive a fork.
    """
    workers = stream.config.workers
    places = [part.objects for part in stream.cache.parts]
    places += [stream.cache.view.objects] if isinstance(stream.cache, AlignedCache) else []
    local = all(isinstance(place, LocalObjects) for place in places)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        loader: StatefulDataLoader[PackedBatch] = StatefulDataLoader(
            _MicroBatches(stream, cursor, first_step),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            multiprocessing_context=("fork" if local else "spawn") if workers else None,
            pin_memory=pin_memory,
            snapshot_every_n_steps=sys.maxsize,  # the place in the stream is in each batch
        )
        return _plainly(iter(loader))


def _plainly(batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    """The batches; a worker's own error, which arrives with its whole traceback as text, is said in its one line."""
    while True:
        try:
            yield next(batches)
        except SignalStoreError as error:
            if "Original Traceback" not in error.what:
                raise
            line = error.what.strip().splitlines()[-1]
            raise type(error)(line.partition("] ")[2] or line) from None
