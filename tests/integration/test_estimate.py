"""estimate says what a cache will cost, close to what it then costs; and refuses where it will not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from signal_store.errors import StorageError
from signal_store.io.local import LocalObjects
from teacher_cache.cli import app
from teacher_cache.commands.build import build
from teacher_cache.commands.estimate import estimate
from tests.tiny import make_model

RecipeMaker = Callable[..., Any]


def test_the_estimate_is_what_the_arrays_then_take(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    recipe = recipe_for(
        tmp_path / "cache.zarr",
        signals={"distribution": {"rank": 24}, "hidden": {"positions": {"every": 2}}, "attention": {}, "stats": {}},
    )
    found = estimate(recipe)
    assert found.encoded_segments >= 64
    assert found.tokens_per_second is not None
    assert found.worker_bytes is not None
    cache = build(recipe)
    objects = LocalObjects(cache.uri)
    assert found.tokens == cache.num_tokens
    for signal in ("distribution", "hidden", "attention", "tokens"):
        actual = sum(objects.size(key) or 0 for key in objects.list(signal) if not key.endswith("zarr.json"))
        low, high = found.bytes_per_token[signal]
        assert low == high
        assert low * found.tokens == pytest.approx(actual, rel=0.3), signal  # units of 1,024 tokens: chunks are tiny here
    everything = sum(objects.size(key) or 0 for key in objects.list(""))
    assert found.total_bytes[0] == pytest.approx(everything, rel=0.35)
    assert len(objects.list("")) == pytest.approx(found.objects, rel=0.5)


def test_quick_gives_a_range_that_holds_the_truth(recipe_for: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tmp_path / "cache.zarr")
    found = estimate(recipe, quick=True)
    low, high = found.bytes_per_token["hidden"]
    assert low < 3 * 36 < high * 1.01
    assert found.hours is None
    assert found.total_bytes[0] < found.total_bytes[1]
    monkeypatch.setattr("teacher_cache.builder.estimation.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"cannot hold this cache; expected [0-9,]+ bytes free; found 1,000"):
        estimate(recipe, quick=True)


def test_verify_exits_with_1_and_names_the_object(cache: Any, tmp_path: Path) -> None:
    root = Path(shutil.copytree(cache.uri, tmp_path / "cache.zarr"))
    run = CliRunner()
    assert run.invoke(app, ["verify", str(root)]).exit_code == 0
    (root / "tokens/byte_end/c/0").unlink()
    done = run.invoke(app, ["verify", str(root)])
    assert done.exit_code == 1
    assert "tokens/byte_end/c/0: gone" in done.stdout
    as_json = json.loads(run.invoke(app, ["verify", str(root), "--json"]).stdout)
    assert as_json["damages"][0]["unit"] == 0


def test_taps_lists_what_there_is(tmp_path: Path) -> None:
    make_model("gpt2", 97).save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["taps", str(tmp_path / "model")])
    assert done.exit_code == 0
    assert "transformer.h.0.attn" in done.stdout
    rows = json.loads(CliRunner().invoke(app, ["taps", str(tmp_path / "model"), "--json"]).stdout)
    assert len(rows) == 4 * 7
