"""Where commands are carried out: so many at a time, each with devices and threads of its own.

An executor is given commands, and gives a future of each one's exit code, which tells when it has ended: `as_completed` of
`concurrent.futures` gives them as they end. This one starts processes of this machine; another, such as a scheduler's, needs
`submit` and `stop` as well, and no more.
"""

import os
import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self

import torch

from run_kit.cores import usable_cores
from signal_store.errors import InputError

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
"""By kind of accelerator, the variable that says which of them a process may see."""


class Executor(Protocol):
    """What carries out commands."""

    def submit(self, command: Sequence[str], log: Path) -> "Future[int]":
        """Carry out a command as soon as there is room for it; what it says on standard error goes to `log`.

        Returns:
            its exit code, once it has ended; `running()` says whether it has begun.
        """

    def stop(self) -> None:
        """End what runs, carry out nothing more, and wait for the end of all."""


class LocalExecutor:
    """Processes of this machine, in slots. `environments`: of each slot, the variables that give it its part of the machine."""

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self.environments = environments
        self._free: queue.PriorityQueue[int] = queue.PriorityQueue()
        for slot in range(len(environments)):
            self._free.put(slot)
        self._threads = ThreadPoolExecutor(max_workers=len(environments))  # each waits for one process
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    @classmethod
    def of(cls, jobs: int) -> Self:
        """So many slots, with even shares of the cores that this process may use, and a device each; where there are more slots
        than devices, as many on each device as on any other, or one more.

        Raises:
            InputError: if `jobs` is less than 1.
        """
        if jobs < 1:
            raise InputError("jobs must be at least 1", found=jobs, where="--jobs")
        variable, devices = visible_devices()
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}
        return cls([threads | ({variable: devices[slot % len(devices)]} if devices else {}) for slot in range(jobs)])

    def submit(self, command: Sequence[str], log: Path) -> "Future[int]":
        """See `Executor`. Commands begin in the order in which they came, each in the lowest slot that is free."""
        return self._threads.submit(self._carry_out, command, log)

    def stop(self) -> None:
        """See `Executor`. Processes are asked to end (SIGTERM)."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _carry_out(self, command: Sequence[str], log: Path) -> int:
        slot = self._free.get()
        try:
            with log.open("wb") as errors:
                process = self._begin(command, errors.fileno(), slot)
                code = process.wait()
            with self._lock:
                self._running.discard(process)
            return code
        finally:
            self._free.put(slot)

    def _begin(self, command: Sequence[str], errors: int, slot: int) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, **self.environments[slot]}
        with self._lock:  # nothing begins that `stop` does not see
            if self._stopped:
                raise RuntimeError("the executor was stopped before this command began")
            process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=errors, env=environment)
            self._running.add(process)
            return process


def visible_devices() -> tuple[str, list[str]]:
    """(the variable that chooses among them, the names of the accelerators that this process sees); none on a CPU, and where the
    kind of accelerator has no such variable."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    variable = VISIBLE.get("" if found is None else found.type, "")
    if not variable:
        return "", []
    count = torch.accelerator.device_count()
    chosen = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    return variable, chosen[:count] or [str(number) for number in range(count)]
