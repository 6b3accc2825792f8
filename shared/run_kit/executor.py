"""Where the runs of a sweep are carried out: so many at a time, each with devices and threads of its own.

An executor has slots. `start` carries out a command in a free one; the job that it returns gives the slot back when it has ended.
This one starts processes of this machine; another, such as a scheduler's, needs `slots` and `start` as well, and no more.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

import torch

from run_kit.cores import usable_cores
from signal_store.errors import InputError

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
"""By kind of accelerator, the variable that says which of them a process may see."""


class Job(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """End it, if it runs, and wait for its end."""


class Executor(Protocol):
    """What carries out commands."""

    @property
    def slots(self) -> int:
        """How many jobs run at a time."""

    def start(self, command: Sequence[str], log: Path) -> Job:
        """Carry out a command in a free slot; what it says on standard error goes to `log`."""


@dataclass(slots=True)
class _Process:
    process: "subprocess.Popen[bytes]"
    log: TextIO

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            self.log.close()
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self.log.close()


@dataclass(slots=True)
class LocalExecutor:
    """Processes of this machine. `environments`: of each slot, the variables that give it its part of the machine."""

    environments: Sequence[Mapping[str, str]]
    _jobs: dict[int, Job] = field(default_factory=dict)

    @classmethod
    def of(cls, jobs: int) -> "LocalExecutor":
        """So many slots, with even shares of the cores that this process may use, and a device each; where there are more slots
        than devices, as many on each device as on any other, or one more."""
        if jobs < 1:
            raise InputError("jobs must be at least 1", found=jobs, where="--jobs")
        variable, devices = visible_devices()
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}
        return cls([threads | ({variable: devices[slot % len(devices)]} if devices else {}) for slot in range(jobs)])

    @property
    def slots(self) -> int:
        """How many jobs run at a time."""
        return len(self.environments)

    def start(self, command: Sequence[str], log: Path) -> Job:
        """See `Executor`."""
        slot = next(n for n in range(self.slots) if n not in self._jobs or self._jobs[n].poll() is not None)
        file = log.open("w")
        environment = {**os.environ, **self.environments[slot]}
        process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=file, env=environment)
        self._jobs[slot] = _Process(process, file)
        return self._jobs[slot]


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
