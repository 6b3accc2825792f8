"""The demo's own rules: a folder that was begun in one size is not gone on with in another."""

import json
from pathlib import Path

import pytest

import demo
from signal_store.errors import MismatchError


@pytest.mark.parametrize("begun", [json.dumps(demo.SIZES["full"]), None])
def test_a_demo_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str | None) -> None:
    monkeypatch.setattr(demo, "OUT", tmp_path)
    (tmp_path / "validation.jsonl").touch()
    if begun is not None:
        (tmp_path / "size.json").write_text(begun)
    with pytest.raises(MismatchError, match="another size"):
        demo.write_corpus(demo.SIZES["default"])
    (tmp_path / "size.json").write_text(json.dumps(demo.SIZES["default"]))
    demo.write_corpus(demo.SIZES["default"])
    assert (tmp_path / "validation.jsonl").stat().st_size == 0, "written once"
