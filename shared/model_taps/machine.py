"""What of a machine a model's numbers depend on, and what differs from the machine that a cache was calibrated on.

Policy: another machine is no error. What it computes is checked against the calibration; what will differ is said before it starts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Self

import torch

from model_taps.native_dtype import cpu_flags, name_of, native_dtypes

KERNEL_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "bf16", "sve", "sve2"
)  # fmt: skip
"""Flags of CPUs by which libraries choose their kernels."""
LAST_BITS = "its numbers may differ from the others' in their last bits"
LIBRARIES = {
    "torch": LAST_BITS,
    "transformers": LAST_BITS,
    "numcodecs": "its bytes may be compressed otherwise, the numbers in them are the same",
}
"""Of the libraries that a unit depends on, what another version means."""


@dataclass(frozen=True, slots=True)
class MachineClass:
    """`device` is `cpu` or a GPU's name and capability; `units` its flags of `KERNEL_FLAGS`; `native` the dtypes that it multiplies
    in natively; `threads` those of torch on a CPU, 0 elsewhere."""

    device: str
    units: tuple[str, ...]
    native: tuple[str, ...]
    threads: int

    @classmethod
    def of(cls, device: torch.device | str) -> Self:
        """This machine's, for a model on this device."""
        device = torch.device(device)
        native = tuple(sorted(map(name_of, native_dtypes(device))))
        if device.type == "cpu":
            return cls("cpu", tuple(flag for flag in KERNEL_FLAGS if flag in cpu_flags()), native, torch.get_num_threads())
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            return cls(f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}", (), native, 0)
        return cls(device.type, (), native, 0)

    def facts(self) -> dict[str, Any]:
        """As JSON, for the `about` block of a record."""
        return {name: list(fact) if isinstance(fact, tuple) else fact for name, fact in asdict(self).items()}


def differences(about: Mapping[str, Any], here: MachineClass, dtype: str) -> Iterator[str]:
    """A line for everything that this machine has otherwise than the one which wrote the record with this `about` block, and what
    that means for a model in `dtype`. A record of before machines were noted has its versions only."""
    for name, meaning in LIBRARIES.items():
        then, now = about.get("versions", {}).get(name), version(name)
        if then is not None and then != now:
            yield f"{name}: calibrated with {then}, this worker has {now}; {meaning}"
    then = about.get("machine")
    if not isinstance(then, Mapping):
        return
    if then.get("device") != here.device:
        yield f"device: calibrated on {then.get('device')}, this worker is on {here.device}; {LAST_BITS}"
    elif tuple(then.get("units", ())) != here.units:
        units = " ".join(then.get("units", ())) or "none"
        yield f"processor: calibrated on one with {units}, here {' '.join(here.units) or 'none'}; {LAST_BITS}"
    elif then.get("threads") != here.threads:
        yield f"threads: calibrated with {then.get('threads')}, this worker has {here.threads}; {LAST_BITS}"
    if set(then.get("native", ())) != set(here.native):
        then_native, here_native = (", ".join(sorted(names)) for names in (then.get("native", ()), here.native))
        yield f"native dtypes: {then_native} where it was calibrated, {here_native} here; the teacher runs in {dtype} as there"
