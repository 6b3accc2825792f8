"""Attention rows of chosen tokens: the stored heads side by side, on one flat entry axis."""

import torch
from torch import Tensor

from signal_store.codecs.attention import encode_attention
from signal_store.signals import AttentionLayout
from teacher_cache.signals.rows import Extracted, numpy_of


@torch.inference_mode()
def extract_attention(layout: AttentionLayout, rows_RHL: Tensor, lengths_R: Tensor) -> Extracted:
    """Entries of R rows, one row after another: all columns, or the heaviest `max_columns` of each head, heaviest first, with
    their column numbers and what is left over."""
    group = layout.group
    kept_RHL = rows_RHL[:, list(layout.head_ids)]
    if layout.max_columns is None:
        inside_RL = torch.arange(kept_RHL.shape[2], device=kept_RHL.device) < lengths_R[:, None]
        return Extracted({f"{group}/weights": numpy_of(encode_attention(kept_RHL.transpose(1, 2)[inside_RL]), "uint8")}, {})
    width = min(layout.max_columns, kept_RHL.shape[2])
    weights_RHM, columns_RHM = kept_RHL.sort(dim=2, descending=True, stable=True)
    weights_RHM, columns_RHM = weights_RHM[..., :width], columns_RHM[..., :width]
    inside_RM = torch.arange(width, device=kept_RHL.device) < lengths_R[:, None]
    residual_RH = (1 - weights_RHM.sum(2)).clamp(min=0)
    return Extracted(
        {
            f"{group}/weights": numpy_of(encode_attention(weights_RHM.transpose(1, 2)[inside_RM]), "uint8"),
            f"{group}/columns": numpy_of(columns_RHM.transpose(1, 2)[inside_RM], "uint32"),
            f"{group}/residual": numpy_of(residual_RH.to(torch.float16), "float16"),
        },
        {},
    )
