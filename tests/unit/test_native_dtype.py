"""Which dtype is taken on which device, what is said of an emulated one, and what of another machine."""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from model_taps import native_dtype
from model_taps.machine import MachineClass, differences
from model_taps.native_dtype import (
    DTYPES,
    choose_dtype,
    emulation_warning,
    matmul_rates,
    native_dtypes,
    trained_dtype,
)
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from signal_store.io.local import LocalObjects
from signal_store.ledger.documents import CALIBRATION, MANIFEST, read_document, unit_key
from teacher_cache.builder import calibrate
from teacher_cache.builder.session import BuildSession
from teacher_cache.builder.tokenizer import tokenizer_files
from teacher_cache.commands.build import build
from teacher_cache.commands.fill import fill
from teacher_cache.teacher.load import Teacher
from tests.tiny import COMMON, make_model

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this a machine whose CPU has these flags, which torch uses."""

    def has(flags: str) -> None:
        monkeypatch.setattr(native_dtype, "cpu_flags", lambda: frozenset(flags.split()))
        monkeypatch.setattr("model_taps.machine.cpu_flags", lambda: frozenset(flags.split()))
        monkeypatch.setattr(native_dtype, "onednn_has", lambda _: True)

    return has


@pytest.mark.parametrize(
    ("flags", "trained_in", "taken", "because"),
    [
        ("avx2", BF16, F32, "trained in bfloat16, but this CPU has none of avx512_bf16, amx_bf16"),
        ("avx2", F16, F32, "trained in float16, but this CPU has none of avx512_fp16, amx_fp16"),
        ("avx2 avx512f avx512_bf16", BF16, BF16, "trained in bfloat16, and this CPU has avx512_bf16"),
        ("avx2 avx512f amx_bf16", F16, F32, "trained in float16, but"),  # bfloat16 drops three of its bits
        ("avx2 avx512_fp16", BF16, F32, "trained in bfloat16, but"),  # float16 would overflow
        ("avx512_fp16", F16, F16, "this CPU has avx512_fp16"),
        ("asimd bf16", BF16, BF16, "this CPU has bf16"),
        ("amx_bf16 avx512_fp16", F32, F32, "trained in float32"),
        ("amx_bf16", torch.float64, F32, "trained in float64"),
        ("amx_bf16", torch.float8_e4m3fn, F32, "float8_e4m3fn"),
        ("amx_bf16", None, F32, "does not say"),
    ],
)
def test_auto_takes_what_is_native_and_never_one_half_for_the_other(
    processor: Callable[[str], None], flags: str, trained_in: torch.dtype | None, taken: torch.dtype, because: str
) -> None:
    processor(flags)
    chosen = choose_dtype("auto", trained_in, "cpu")
    assert chosen.dtype == taken
    assert because in chosen.reason
    assert choose_dtype("float16", trained_in, "cpu").dtype == F16, "an explicit dtype is taken as it is"


@pytest.mark.parametrize(("capability", "native"), [((6, 1), {F32}), ((7, 5), {F32, F16}), ((8, 0), {F32, F16, BF16})])
def test_a_gpu_by_its_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: set[torch.dtype]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert native_dtypes("cuda").keys() == native
    reason = choose_dtype("auto", BF16, "cuda").reason
    assert f"compute capability {capability[0]}.{capability[1]}" in reason
    assert choose_dtype("auto", BF16, "cuda").dtype == (BF16 if BF16 in native else F32)


def test_units_that_torch_does_not_use_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_dtype, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(native_dtype, "onednn_has", lambda _: False)
    chosen = choose_dtype("auto", BF16, "cpu")
    assert chosen.dtype == F32
    assert "oneDNN does not use it" in chosen.reason


def test_an_emulated_dtype_is_warned_of_with_both_rates(processor: Callable[[str], None]) -> None:
    processor("avx2")
    warning = emulation_warning(BF16, "cpu", "teacher.dtype")
    assert warning is not None
    assert "\n" not in warning
    assert all(word in warning for word in ("teacher.dtype: bfloat16 is emulated", "GFLOP/s", "float32", "`auto`"))
    assert emulation_warning(F32, "cpu", "teacher.dtype") is None
    processor("avx512_bf16")
    assert emulation_warning(BF16, "cpu", "teacher.dtype") is None


def test_rates_are_of_every_dtype() -> None:
    rates = matmul_rates("cpu")
    assert rates.keys() == set(DTYPES.values())
    assert all(0.01 < rate < 1e6 for rate in rates.values())


def test_a_checkpoints_dtype_is_read_from_its_config() -> None:
    assert trained_dtype(AutoConfig.for_model("llama", **COMMON, dtype="bfloat16")) == BF16
    assert trained_dtype(AutoConfig.for_model("llama", **COMMON)) is None
    text = AutoConfig.for_model("llama", **COMMON, dtype="float16").to_dict()
    assert trained_dtype(AutoConfig.for_model("llava", text_config=text)) == F16


ABOUT: dict[str, Any] = {
    "versions": {"torch": torch.__version__, "transformers": "4.0", "numcodecs": "0.1"},
    "machine": {"device": "cpu", "units": ["avx2", "avx512_bf16"], "native": ["bfloat16", "float32"], "threads": 8},
}
HERE = MachineClass("cpu", ("avx2",), ("float32",), 8)


def test_what_another_machine_has_otherwise_is_a_line_each() -> None:
    lines = "\n".join(differences(ABOUT, HERE, "bfloat16"))
    assert [line.partition(":")[0] for line in lines.splitlines()] == ["transformers", "numcodecs", "processor", "native dtypes"]
    assert "calibrated on one with avx2 avx512_bf16, here avx2" in lines
    assert "the teacher runs in bfloat16 as there" in lines
    (line,) = differences({"machine": HERE.facts() | {"threads": 2}}, HERE, "float32")
    assert line.startswith("threads: calibrated with 2, this worker has 8")
    (line, *_) = differences({"machine": HERE.facts() | {"device": "GPU, compute capability 9.0"}}, HERE, "float32")
    assert line.startswith("device: calibrated on GPU, compute capability 9.0, this worker is on cpu")
    assert not list(differences({"machine": HERE.facts()}, HERE, "float32"))
    assert not list(differences({}, HERE, "float32")), "of an older cache nothing is known"


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


def test_a_plan_does_not_know_whether_its_machine_was_offline(tokenizer: Any) -> None:
    files = []
    for offline in (False, True):
        tokenizer.init_kwargs["local_files_only"] = offline
        files.append(tokenizer_files(tokenizer))
    assert files[0] == files[1]
