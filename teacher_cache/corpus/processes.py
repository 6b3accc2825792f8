"""Rows cut by several processes, their outcomes in the order of the rows: the plan is the same whatever their number.

The work begins in this process. Others are started once it took a while: a small corpus does not pay for them.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Self

from run_kit.worker_pool import worker_pool
from signal_store.errors import OutOfMemoryError
from teacher_cache.corpus.cutting import Cutter, Job, Outcome

ALONE_SECONDS = 5.0
"""Work of this process before others are started: about what starting them costs."""
JOBS_PER_PROCESS = 3
"""Jobs that wait or are done and not yet taken, which bounds memory."""


class Cutting:
    """Cuts jobs, in order. A context: on leaving, its processes end."""

    def __init__(self, cutter: Cutter, processes: int) -> None:
        self._cutter, self._processes = cutter, processes
        self._spent = 0.0
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def outcomes(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Outcome]]]:
        """Each job with what became of its rows. Jobs are taken as they are needed, a few ahead."""
        pending = iter(jobs)
        while self._processes == 1 or self._spent < ALONE_SECONDS:
            job = next(pending, None)
            if job is None:
                return
            started = time.perf_counter()
            found = self._cutter.cut(job)
            self._spent += time.perf_counter() - started
            yield job, found
        yield from self._in_processes(pending)

    def _in_processes(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, list[Outcome]]]:
        running: deque[tuple[Job, Future[list[Outcome]]]] = deque()
        try:
            for job in jobs:
                running.append((job, self._started().submit(_cut, job)))
                if len(running) >= JOBS_PER_PROCESS * self._processes:
                    first, future = running.popleft()
                    yield first, future.result()
            for first, future in running:
                yield first, future.result()
        except BrokenProcessPool as error:
            raise OutOfMemoryError(
                "a process that plans was ended from outside",
                found="most often a system short of memory",
                remedy="Lower --processes; the same command begins the plan anew.",
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = worker_pool(self._processes, _begin, (self._cutter.elsewhere(),))
        return self._pool


_own: list[Cutter] = []
"""In a process of the pool: its cutter."""


def _begin(cutter: Cutter) -> None:
    _own.append(cutter)


def _cut(job: Job) -> list[Outcome]:
    return _own[0].cut(job)
