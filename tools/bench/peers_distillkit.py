"""DistillKit's codec and losses, from a checkout of it: what it stores of a token, and the gradient that it gives a student."""

import importlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

RECOMMENDED = {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
BUDGET = {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
"""The two settings of its README."""
MISSING = ("zero", "symmetric_uniform")


@dataclass(frozen=True)
class DistillKit:
    """A checkout, its path on `sys.path`."""

    folder: Path

    def __post_init__(self) -> None:
        sys.path.insert(0, str(self.folder))

    def codec(self, vocab_size: int, setting: dict[str, Any], *, normalize_t: bool) -> Any:
        """Its `LogprobCompressor`."""
        compression = importlib.import_module("distillkit.compression")
        fields = {"d": vocab_size, "exact_dtype": "bfloat16", "term_dtype": "float32", "residual_bins": [], "delta_encoding": False}
        config = compression.DistributionQuantizationConfig(**fields, error_diffusion=False, normalize_t=normalize_t, **setting)
        return compression.LogprobCompressor(config)

    def gradient(
        self, divergence: str, logits_NV: Tensor, ids_Nk: Tensor, logprobs_Nk: Tensor, temperature: float, missing: str
    ) -> Tensor | None:
        """[N, V] gradient of its summed loss with respect to the student's logits; None for a divergence it does not have."""
        names = {"forward_kl": ("kl", "sparse_kl_div_inner"), "jsd": ("jsd", "sparse_jsd_inner")}
        if divergence not in names:
            return None
        module, function = names[divergence]
        loss = getattr(importlib.import_module(f"distillkit.lossfuncs.{module}"), function)
        handling = importlib.import_module("distillkit.missing_probability").MissingProbabilityHandling(missing)
        with torch.enable_grad():
            leaf = logits_NV.detach().clone().requires_grad_()
            value = loss(leaf[None], ids_Nk[None], logprobs_Nk[None].clone(), missing=handling, temperature=temperature)
            (found,) = torch.autograd.grad(value.sum(), leaf)
        return found


def parquet_bytes(rows: dict[str, Tensor]) -> float:
    """Bytes of a row in a zstd-compressed Parquet file of its columns, as its datasets are kept."""
    columns = {name: pa.FixedSizeListArray.from_arrays(pa.array(t.flatten().numpy()), t.shape[1]) for name, t in rows.items()}
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd", compression_level=9)
    return len(file.getvalue()) / len(next(iter(rows.values())))
