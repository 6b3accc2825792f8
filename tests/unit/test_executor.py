"""Runs of a sweep: each has a device of its own, the cores that the process may use are shared out, no signal handler is set."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

import pytest
import torch

from run_kit.cores import usable_cores
from run_kit.executor import LocalExecutor
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


def test_each_run_has_a_device_and_its_share_of_the_cores(
    three_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5, 6})  # of however many cores the machine has
    assert usable_cores() == 4
    two = LocalExecutor.of(2)
    codes = [two.submit([sys.executable, "-c", SHOW], tmp_path / str(n)) for n in range(2)]
    assert [code.result() for code in codes] == [0, 0]
    assert [(tmp_path / str(n)).read_text().split() for n in range(2)] == [["4", "2"], ["7", "2"]]
    assert two.submit([sys.executable, "-c", SHOW], tmp_path / "again").result() == 0  # its slot was given back
    assert (tmp_path / "again").read_text().split()[0] == "4"
    assert [e["CUDA_VISIBLE_DEVICES"] for e in LocalExecutor.of(5).environments] == ["4", "7", "GPU-8a", "4", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in LocalExecutor.of(3).environments] == ["0", "1", "2"]
    with pytest.raises(InputError, match="at least 1"):
        LocalExecutor.of(0)


SLEEP = "import sys, time; print('begun', file=sys.stderr, flush=True); time.sleep(60)"


def test_what_runs_is_ended_and_what_waits_never_begins(tmp_path: Path) -> None:
    one = LocalExecutor.of(1)
    sleeps, waits = (one.submit([sys.executable, "-c", SLEEP], tmp_path / name) for name in ("a", "b"))
    while not (tmp_path / "a").exists() or not (tmp_path / "a").read_text():
        time.sleep(0.01)
    assert sleeps.running()
    assert not waits.running()
    one.stop()
    assert sleeps.result() == -signal.SIGTERM
    assert waits.cancelled()
    assert not (tmp_path / "b").exists()
    with pytest.raises(RuntimeError):
        one.submit([sys.executable, "-c", ""], tmp_path / "c")


def test_results_come_as_they_end(tmp_path: Path) -> None:
    two = LocalExecutor.of(2)
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)"
    slow, quick = (two.submit([sys.executable, "-c", command], tmp_path / "log") for command in (waits, "raise SystemExit(3)"))
    ended = as_completed([slow, quick])
    assert next(ended) is quick
    assert quick.result() == 3
    (tmp_path / "go").touch()
    assert next(ended) is slow
    two.stop()


class AtOnce:
    """An executor that writes the result itself."""

    def submit(self, command: Sequence[str], log: Path) -> "Future[int]":
        assert command[1:4] == ["-m", "student_train.cli", "run"]
        (log.parent / "result.json").write_text(json.dumps({"validation_loss": 1.0}))
        code: Future[int] = Future()
        code.set_result(0)
        return code

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
