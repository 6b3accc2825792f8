"""Which dtypes a device multiplies matrices in natively, which one to take, and what that is worth here.

Policy of `auto`: the dtype a checkpoint was trained in where the device has units for it, float32 everywhere else. One 16-bit dtype
never stands in for the other: float16 overflows on what bfloat16 holds, bfloat16 drops three of float16's eleven bits. An emulated
dtype is several times slower than float32, so it is taken only where it is asked for, with a warning that has both measured rates.
"""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import PretrainedConfig

from signal_store.codecs.bf16_units import onednn_has

AUTO, ASKED = "auto", "the recipe names it"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes a recipe can name."""
CPU_UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),  # the last is ARM's
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
"""Flags of CPUs, any of which means units that multiply in this dtype."""
CUDA_CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}
"""The least compute capability with tensor cores for this dtype."""
FIRST_SIZE, LAST_SIZE = 128, 4096
PRODUCT_SECONDS, MEASURED_SECONDS = 0.02, 0.12


@dataclass(frozen=True, slots=True)
class NativeDtype:
    """The dtype to compute in, and why, in a sentence that begins with no capital and ends without a full stop."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """As a recipe names it."""
        return name_of(self.dtype)


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, by Linux's names; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), ":")
    return frozenset(found.partition(":")[2].split())


def native_dtypes(device: torch.device | str) -> Mapping[torch.dtype, str]:
    """The dtypes this device multiplies matrices in natively, of `DTYPES`, each with what shows it. float32 always."""
    device = torch.device(device)
    found = {torch.float32: "every device has float32 units"}
    if device.type == "cpu":
        for dtype, names in CPU_UNITS.items():
            units = [name for name in names if name in cpu_flags()]
            if units and onednn_has(dtype):
                found[dtype] = f"this CPU has {', '.join(units)}"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        named = f"compute capability {capability[0]}.{capability[1]}"
        found |= {dtype: f"this GPU has {named}" for dtype, least in CUDA_CAPABILITY.items() if capability >= least}
    elif device.type == "mps":
        found[torch.float16] = "Apple GPUs have float16 units"
    elif device.type == "xpu":
        found |= dict.fromkeys(CPU_UNITS, "Intel GPUs have units for it")
    return found


def lacking(dtype: torch.dtype, device: torch.device | str) -> str:
    """Why a dtype is not native here, such as `this CPU has none of avx512_bf16, amx_bf16`."""
    device = torch.device(device)
    if device.type == "cpu" and dtype in CPU_UNITS:
        arm = platform.machine().lower() in {"aarch64", "arm64"}
        names = [name for name in CPU_UNITS[dtype] if (name == "bf16") == arm]
        if present := [name for name in names if name in cpu_flags()]:
            return f"this CPU has {', '.join(present)}, but torch's oneDNN does not use it here"
        return f"this CPU has none of {', '.join(names)}" if names else f"torch has no {name_of(dtype)} products for this CPU"
    if device.type == "cuda" and dtype in CUDA_CAPABILITY:
        least, found = CUDA_CAPABILITY[dtype], torch.cuda.get_device_capability(device)
        return f"this GPU has compute capability {found[0]}.{found[1]}, below {least[0]}.{least[1]}"
    return f"a {device.type} device has no units for it"


def choose_dtype(wanted: str, trained_in: torch.dtype | None, device: torch.device | str) -> NativeDtype:
    """What to compute in: `wanted` of `DTYPES` as it is; of `auto`, see this module's policy. `trained_in` is the checkpoint's,
    None where it does not say."""
    if wanted != AUTO:
        return NativeDtype(DTYPES[wanted], ASKED)
    if trained_in is None:
        return NativeDtype(torch.float32, "the checkpoint does not say what it was trained in")
    name = name_of(trained_in)
    if trained_in == torch.float32:
        return NativeDtype(trained_in, "the checkpoint was trained in float32")
    if trained_in not in CPU_UNITS:
        return NativeDtype(torch.float32, f"the checkpoint was trained in {name}, in which no device runs a whole model")
    if shown := native_dtypes(device).get(trained_in):
        return NativeDtype(trained_in, f"the checkpoint was trained in {name}, and {shown}")
    return NativeDtype(torch.float32, f"the checkpoint was trained in {name}, but {lacking(trained_in, device)}")


def trained_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype that a checkpoint's config names, or its text model's; None where neither does."""
    for part in (config, config.get_text_config()):
        named = getattr(part, "dtype", None)
        found = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else named
        if isinstance(found, torch.dtype):
            return found
    return None


def matmul_rates(device: torch.device | str, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())) -> dict[torch.dtype, float]:
    """GFLOP/s of square matrix products in each dtype, with the threads of this process: the best of those that fit into an eighth
    of a second. A dtype that the device does not multiply at all is left out."""
    found = {}
    for dtype in dtypes:
        try:
            found[dtype] = _rate(torch.device(device), dtype)
        except (RuntimeError, TypeError):  # torch has no such kernel there
            continue
    return found


@torch.inference_mode()
def _rate(device: torch.device, dtype: torch.dtype) -> float:
    size, seconds = FIRST_SIZE, 0.0
    while True:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        _product_seconds(left, right)  # kernels are made at their first call
        seconds = _product_seconds(left, right)
        if seconds >= PRODUCT_SECONDS / 8 or size >= LAST_SIZE:  # the next size takes eight times as long
            break
        size *= 2
    for _ in range(int((MEASURED_SECONDS - seconds) / seconds)):
        seconds = min(seconds, _product_seconds(left, right))
    return 2 * size**3 / seconds / 1e9


def _product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait_for(left.device)
    begun = time.perf_counter()
    torch.nn.functional.linear(left, right)
    _wait_for(left.device)
    return time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def emulation_warning(
    dtype: torch.dtype, device: torch.device | str, what: str, advice: str = "`auto` takes what is native"
) -> str | None:
    """One line where a dtype is emulated on a device, with both measured rates; None where it is native. `what` names the recipe's
    key, such as `teacher.dtype`."""
    if dtype in native_dtypes(device):
        return None
    rates = matmul_rates(device, (dtype, torch.float32))
    shown = f"{rates[dtype]:,.0f}" if dtype in rates else "no"
    return (
        f"{what}: {name_of(dtype)} is emulated here ({lacking(dtype, device)}): "
        f"{shown} GFLOP/s measured, float32 {rates[torch.float32]:,.0f}; {advice}"
    )
