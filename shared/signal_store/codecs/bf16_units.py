"""Products in bfloat16 units with float32 sums, on CPUs that have them: several times as fast as float32, and exact for numbers
that bfloat16 holds. The one file that asks torch for what it does not promise of a CPU's units.
"""

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

_switched = threading.RLock()


@contextlib.contextmanager
def bf16_units() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices in bfloat16 units with float32 sums.

    torch's switch is the process's: it is held for single products only, by one thread at a time, and put back as it was.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _switched:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


@cache
def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 natively."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001  (torch has no public way)


def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which holds torch's kernels for these units, takes bfloat16 or float16 (ONEDNN_MAX_CPU_ISA can forbid it)."""
    if not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    ask = operators._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else operators._is_mkldnn_fp16_supported  # noqa: SLF001
    return bool(ask())


def two_halves(matrix: Tensor) -> Tensor:
    """[V, 2r]: a float32 matrix [V, r] as the sum of two that bfloat16 holds, side by side; 16 of its 24 bits are kept."""
    high = matrix.to(torch.bfloat16).float()
    low = (matrix - high).to(torch.bfloat16).float()
    return torch.cat([high, low], 1)
