"""File systems that cannot do what a commit needs are named, by `doctor` and by a build before it begins; a failing disk is one line."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from run_kit.command_line import guarded
from run_kit.environment import _disk
from signal_store.errors import StorageError
from signal_store.io.commit_check import commit_faults
from signal_store.io.local import LocalObjects
from student_train.train.checkpoint import save_best


def lacking(monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> None:
    """Make the file system one without hard links, folder syncs or renames, which answers with this error."""

    def refuses(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    def syncs(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuses()

    if what == "sync a folder":
        monkeypatch.setattr(os, "fsync", syncs)
    else:
        monkeypatch.setattr(os, {"make hard links": "link", "rename a file": "replace"}[what], refuses)


WITHOUT = [
    ("make hard links", errno.EPERM),  # what s3fs, exFAT and SMB answer
    ("make hard links", errno.ENOSYS),  # gcsfuse
    ("make hard links", errno.EOPNOTSUPP),
    ("make hard links", errno.EMLINK),
    ("make hard links", errno.EXDEV),
    ("sync a folder", errno.EINVAL),
    ("sync a folder", errno.ENOSYS),
    ("sync a folder", errno.ENOTSUP),
    ("rename a file", errno.ENOSYS),
]


@pytest.mark.parametrize(("what", "number"), WITHOUT)
def test_what_a_file_system_cannot_do_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> None:
    lacking(monkeypatch, what, number)
    (fault,) = commit_faults(LocalObjects(tmp_path))
    assert fault.what == f"the file system cannot {what}, which a commit needs"
    assert os.strerror(number) in str(fault)
    assert "may read it" not in str(fault)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (check,) = [check for check in _disk(tmp_path) if check.name == "commit"]
    assert check.state == "bad"
    assert what in check.found


def test_a_link_that_is_forbidden_is_no_missing_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that may not be written: in the scratch folder links work."""
    links = os.link

    def forbids(source: Any, target: Any, **options: Any) -> None:
        if Path(target).name == "a":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        links(source, target, **options)

    monkeypatch.setattr(os, "link", forbids)
    with pytest.raises(StorageError, match="access is refused"):
        LocalObjects(tmp_path).create("a", b"1")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_place_that_creates_twice_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_faults(LocalObjects(tmp_path)) == []
    monkeypatch.setattr(os, "link", lambda source, target, **_: os.replace(source, target))  # noqa: PTH105  (as some servers do)
    (fault,) = commit_faults(LocalObjects(tmp_path))
    assert "creates an object twice" in fault.what


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EIO, "the disk, or the server behind it, fails"),
        (errno.ESTALE, "the disk, or the server behind it, fails"),
        (errno.ENOTCONN, "the disk, or the server behind it, fails"),
        (errno.ENOSYS, "lacks an operation"),
        (errno.EMFILE, "too many files are open"),
    ],
)
def test_a_failing_disk_is_one_line(number: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def reads() -> None:
        raise OSError(number, os.strerror(number), "cache.zarr/zarr.json")

    with pytest.raises(SystemExit) as stopped:
        guarded(reads)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_run_goes_on_where_folders_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "sync a folder", errno.EINVAL)
    save_best(tmp_path, torch.nn.Linear(2, 2), 1, writes=True)
    assert (tmp_path / "model.safetensors").is_file()
    lacking(monkeypatch, "sync a folder", errno.ENOSPC)
    with pytest.raises(StorageError, match="disk is full"):
        save_best(tmp_path, torch.nn.Linear(2, 2), 2, writes=True)
