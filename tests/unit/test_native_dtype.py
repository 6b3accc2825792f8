"""Which dtype is taken on which device, what is said of an emulated one, and what of another machine."""

from collections.abc import Callable
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
from teacher_cache.builder.tokenizer import tokenizer_files
from tests.tiny import COMMON

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


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


def test_a_plan_does_not_know_whether_its_machine_was_offline(tokenizer: Any) -> None:
    files = []
    for offline in (False, True):
        tokenizer.init_kwargs["local_files_only"] = offline
        files.append(tokenizer_files(tokenizer))
    assert files[0] == files[1]
