"""A folder is one living process's: another is refused by name, a dead one's claim is taken over, forked workers keep nothing."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from signal_store.errors import InputError
from student_train.session.claim import NAME, Claim

HOLDER = """
import os, sys, time
from pathlib import Path
from student_train.session.claim import Claim
claim = Claim(Path(sys.argv[1]), "trains")
claim.take()
if sys.argv[2] == "forks":
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, b".")
        os.close(1)
        time.sleep(60)
    os.read(reader, 1)  # the child has begun, and has let go of what it inherited
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path, mode: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), mode], stdout=subprocess.PIPE, text=True, process_group=0, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def living(tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    process = holder(tmp_path / "run", "forks")
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_living_process_keeps_its_folder_and_a_dead_one_does_not(tmp_path: Path, living: "subprocess.Popen[str]") -> None:
    mine = Claim(tmp_path / "run", "trains")
    with pytest.raises(InputError, match=f"another process trains in this folder.*process {living.pid} on {platform.node()}"):
        mine.take()
    living.kill()
    living.wait()  # the child that it forked lives on
    with mine:
        mine.take()
        mine.take()
        assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(InputError, match=f"process {os.getpid()} "):
            Claim(tmp_path / "run", "trains").take()
    with Claim(tmp_path / "run", "trains") as next_one:
        next_one.take()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Claim(tmp_path, "trains") as claim:
        claim.take()
    assert "has no locks" in capsys.readouterr().err
