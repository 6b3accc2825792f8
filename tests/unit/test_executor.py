"""Runs of a sweep: each has a device of its own, the cores that the process may use are shared out, no signal handler is set."""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from run_kit.cores import usable_cores
from run_kit.executor import Job, LocalExecutor
from signal_store.errors import InputError
from student_train.commands.sweep import sweep
from student_train.sweep_recipe import SweepRecipe

SHOW = "import os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS'], file=sys.stderr)"


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7,GPU-8a")


def finished(job: Job) -> int:
    while (code := job.poll()) is None:
        time.sleep(0.01)
    return code


def test_each_run_has_a_device_and_its_share_of_the_cores(
    three_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5, 6})  # of however many cores the machine has
    assert usable_cores() == 4
    two = LocalExecutor.of(2)
    assert two.slots == 2
    jobs = [two.start([sys.executable, "-c", SHOW], tmp_path / str(n)) for n in range(2)]
    assert [finished(job) for job in jobs] == [0, 0]
    assert [(tmp_path / str(n)).read_text().split() for n in range(2)] == [["4", "2"], ["7", "2"]]
    assert finished(two.start([sys.executable, "-c", SHOW], tmp_path / "again")) == 0  # its slot was given back
    assert (tmp_path / "again").read_text().split()[0] == "4"
    assert [e["CUDA_VISIBLE_DEVICES"] for e in LocalExecutor.of(5).environments] == ["4", "7", "GPU-8a", "4", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in LocalExecutor.of(3).environments] == ["0", "1", "2"]
    with pytest.raises(InputError, match="at least 1"):
        LocalExecutor.of(0)


def test_a_job_is_ended(tmp_path: Path) -> None:
    job = LocalExecutor.of(1).start([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert job.poll() is None
    job.stop()
    assert job.poll() not in {None, 0}


class AtOnce:
    """An executor that writes the result itself."""

    slots = 2

    def start(self, command: Sequence[str], log: Path) -> Job:
        assert command[1:4] == ["-m", "student_train.cli", "run"]
        (log.parent / "result.json").write_text(json.dumps({"validation_loss": 1.0}))
        return Done()


class Done:
    def poll(self) -> int | None:
        return 0

    def stop(self) -> None:
        return None


def test_a_sweep_may_be_called_from_any_thread(tmp_path: Path) -> None:
    base: dict[str, Any] = {"cache": "c", "student": {"checkpoint": "s"}, "preset": "cross_entropy", "steps": 1, "validation": {}}
    recipe = SweepRecipe.model_validate({"out": tmp_path, "base": base, "seeds": [0, 1, 2]})
    reports: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: reports.append(sweep(recipe, executor=AtOnce())))
    thread.start()
    thread.join()
    assert [group["runs"] for group in reports[0]["groups"]] == [3]
