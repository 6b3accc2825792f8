"""Stands in for `model_taps.native_dtype` until that is here: which dtypes a device multiplies natively, and at what rate."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch

CPU_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def native_dtypes(device: torch.device | str) -> Mapping[torch.dtype, str]:
    """The dtypes this device multiplies matrices in natively, each with what shows it."""
    device = torch.device(device)
    found = {torch.float32: "every device has float32 units"}
    if device.type == "cpu":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        if units := [name for name in CPU_UNITS if name in flags.split()]:
            found[torch.bfloat16] = f"this CPU has {', '.join(units)}"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        found[torch.bfloat16] = "this GPU has compute capability 8 or more"
    return found


def lacking(dtype: torch.dtype, device: torch.device | str) -> str:
    """Why a dtype is not native here."""
    return f"this {torch.device(device).type} has no units for {str(dtype).removeprefix('torch.')}"


def emulation_warning(dtype: torch.dtype, device: torch.device | str, what: str) -> str | None:
    """One line where a dtype is emulated on a device, with both measured rates; None where it is native."""
    if dtype in native_dtypes(device):
        return None
    rates = {each: _rate(torch.device(device), each) for each in (dtype, torch.float32)}
    name = str(dtype).removeprefix("torch.")
    return (
        f"{what}: {name} is emulated here ({lacking(dtype, device)}): {rates[dtype]:,.0f} GFLOP/s measured, "
        f"float32 {rates[torch.float32]:,.0f}; `auto` takes what is native."
    )


@torch.inference_mode()
def _rate(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.randn(512, 512, device=device).to(dtype)
    torch.mm(matrix, matrix)
    started = time.perf_counter()
    torch.mm(matrix, matrix)[0, 0].item()
    return 2 * 512**3 / (time.perf_counter() - started) / 1e9
