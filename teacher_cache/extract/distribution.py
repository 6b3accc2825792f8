"""The distribution of every row of a batch, in chunks of rows, so that [tokens, vocabulary] is never held."""

import torch
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.distribution_codec import DistributionCodec
from teacher_cache.extract.rows import Extracted, numpy_of

LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Of one chunk of logits: what stays in a core's cache, or what keeps a GPU busy."""


@torch.inference_mode()
def extract_distribution(codec: DistributionCodec, head: OutputHead, hidden_ND: Tensor, labels_N: Tensor) -> Extracted:
    """Codes of N rows."""
    step = max(1, LOGITS_BYTES.get(hidden_ND.device.type, 2**26) // (4 * codec.vocab_size))
    parts, saturated = [], 0
    for start in range(0, len(hidden_ND), step):
        chunk = slice(start, start + step)
        codes, count = codec.encode(hidden_ND[chunk], head.logits(hidden_ND[chunk]), labels_N[chunk])
        parts.append(codes)
        saturated += int(count)
    tail_type = "int8" if codec.tail_bits == 8 else "int16"
    rows = {
        "distribution/scalars": numpy_of(torch.cat([p.scalars for p in parts]), "float16"),
        "distribution/head_ids": numpy_of(torch.cat([p.head_ids for p in parts]), "uint32"),
        "distribution/head_codes": numpy_of(
            torch.cat([p.head_codes for p in parts]), "uint8" if codec.head_bits == 8 else "uint16"
        ),
        "distribution/tail_codes": numpy_of(torch.cat([p.tail_codes for p in parts]), tail_type),
    }
    codes_per_row = codec.head + codec.rank
    rows = {path: array for path, array in rows.items() if array.shape[1]}
    return Extracted(rows, {"distribution": (saturated, len(hidden_ND) * codes_per_row)})
