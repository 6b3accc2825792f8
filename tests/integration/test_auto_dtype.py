"""`auto` of a cache: settled once, whoever calibrates, and for caches of before there was one."""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_taps.machine import MachineClass
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from signal_store.io.local import LocalObjects
from signal_store.ledger.documents import CALIBRATION, MANIFEST, read_document, unit_key
from teacher_cache.builder import calibrate
from teacher_cache.builder.session import BuildSession
from teacher_cache.commands.build import build
from teacher_cache.commands.fill import fill
from teacher_cache.teacher.load import Teacher
from tests.tiny import make_model

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_auto_is_settled_once_for_a_cache(
    tmp_path: Path,
    recipe_for: Callable[..., Any],
    tokenizer: Any,
    processor: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Calibrated with units for it, gone on with where there are none, added to by an overlay, opened by any."""
    folder = tmp_path / "teacher"
    make_model("llama", len(tokenizer), scale=8.0).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    teacher = {"model": str(folder), "device": "cpu"}
    processor("avx2 avx512_bf16")
    recipe = recipe_for(tmp_path / "cache.zarr", teacher=teacher, signals={"distribution": {"rank": 8}})
    assert recipe.teacher.dtype == "auto"
    fill(recipe)
    assert "emulated" not in capsys.readouterr().err
    objects = LocalObjects(recipe.cache)
    for key in (CALIBRATION, MANIFEST):
        assert "trained in bfloat16, and this CPU has avx512_bf16" in read_document(objects, key).about["dtype_reason"]
    assert read_document(objects, CALIBRATION).about["machine"] == MachineClass.of("cpu").facts()
    assert read_document(objects, unit_key(0)).about["machine"] == MachineClass.of("cpu").facts()

    processor("avx2")
    cache = build(recipe)
    assert cache.manifest.teacher.dtype == "bfloat16"
    said = capsys.readouterr().err
    assert "bfloat16 is emulated here" in said
    assert "taken because the cache was calibrated in it" in said
    assert "processor: calibrated on one with avx2 avx512_bf16, here avx2" in said
    assert build(recipe).manifest.cache_id == cache.manifest.cache_id, "sealed: opened, with nothing to run"
    assert build(recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": "bfloat16"})}))
    with pytest.raises(MismatchError, match=r"teacher\.dtype|dtype, weights_digest"):
        build(recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": "float32"})}))
    overlay = {"base": cache.uri, "sources": None, "context": None, "unit_tokens": None}
    both = build(recipe_for(tmp_path / "overlay.zarr", teacher=teacher, signals={"distribution": None, "hidden": {}}, **overlay))
    assert both.manifest.teacher.dtype == "bfloat16"
    other = recipe_for(tmp_path / "other.zarr", teacher=teacher, signals={"distribution": {"rank": 8}})
    assert fill(other).manifest.teacher.dtype == "float32"


def test_the_teacher_of_a_lost_race_is_gone_before_the_next_is_loaded(
    tmp_path: Path,
    recipe_for: Callable[..., Any],
    tokenizer: Any,
    processor: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine without units for bfloat16 calibrates, and finds that one with them was first."""
    folder = tmp_path / "teacher"
    make_model("llama", len(tokenizer), scale=8.0).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = recipe_for(tmp_path / "cache.zarr", teacher={"model": str(folder), "device": "cpu"}, signals={"hidden": {}})
    load, measured = calibrate.load_recipe_teacher, calibrate.calibration_body
    loaded: list[weakref.ref[Any]] = []

    def loading(*arguments: Any) -> Teacher:
        assert not [found for found in loaded if found() is not None], "two teachers in memory"
        teacher = load(*arguments)
        loaded.append(weakref.ref(teacher.model))
        return teacher

    def late(*arguments: Any) -> Any:
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(calibrate, "load_recipe_teacher", load)
            undisturbed.setattr(calibrate, "calibration_body", measured)
            processor("avx2 avx512_bf16")
            assert BuildSession.ready(recipe).calibrated.manifest.teacher.dtype == "bfloat16"
            processor("avx2")
        return measured(*arguments)

    monkeypatch.setattr(calibrate, "load_recipe_teacher", loading)
    monkeypatch.setattr(calibrate, "calibration_body", late)
    processor("avx2")
    assert BuildSession.ready(recipe).calibrated.manifest.teacher.dtype == "bfloat16"
    assert len(loaded) == 2


def test_a_cache_of_before_there_was_auto_goes_on(
    tmp_path: Path, cache: Cache, recipe_for: Callable[..., Any], teacher_folder: Path
) -> None:
    copy = shutil.copytree(cache.uri, tmp_path / "cache.zarr")
    recipe = recipe_for(copy, teacher={"model": str(teacher_folder), "device": "cpu"})
    assert build(recipe).manifest.cache_id == cache.manifest.cache_id
