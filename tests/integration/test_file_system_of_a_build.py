"""A build on a file system that lacks what the format needs."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_kit.command_line import guarded
from teacher_cache.commands.plan import plan
from tests.unit.test_file_systems import lacking


def test_a_build_is_refused_before_it_reads_any_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe_for: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lacking(monkeypatch, "make hard links", errno.EPERM)
    monkeypatch.setattr("teacher_cache.builder.planning.plan_body", lambda *_: pytest.fail("a text was read"))

    def plans() -> None:
        plan(recipe_for(tmp_path / "cache.zarr"))

    with pytest.raises(SystemExit) as stopped:
        guarded(plans)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the file system cannot make hard links" in line
