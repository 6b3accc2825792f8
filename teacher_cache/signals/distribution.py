"""The distribution of every row of a batch, in chunks of rows, so that [tokens, vocabulary] is never held."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from signal_store.codecs.distribution import DistributionCodec
from signal_store.codecs.zigzag import to_zigzag
from signal_store.format.grid import id_dtype
from signal_store.signals.distribution import sampled_path
from teacher_cache.signals.rows import Extracted, numpy_of

LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Of one chunk of logits, whose tokens share one reading of the output head."""
ENCODE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Of the logits that are encoded at a time: what stays in a core's cache; a GPU takes the whole chunk."""


@torch.inference_mode()
def extract_distribution(
    codec: DistributionCodec,
    logits_of: Callable[[slice], Tensor],
    hidden_ND: Tensor,
    labels_N: Tensor,
    draws: int,
    key: tuple[int, int],
    *,
    zigzag: bool = False,
) -> Extracted:
    """Codes of N rows. `logits_of` gives float32 logits of a slice of rows; `draws` ids a row are drawn at each temperature, by a
    generator of `key`; `zigzag`: how the cache holds its tail codes."""
    block = max(1, ENCODE_BYTES.get(hidden_ND.device.type, 2**26) // (4 * codec.vocab_size))
    step = max(1, LOGITS_BYTES.get(hidden_ND.device.type, 2**26) // (4 * codec.vocab_size))
    uniform = np.random.Generator(np.random.Philox(key=np.asarray(key, dtype=np.uint64)))
    parts, saturated = [], 0
    drawn: dict[float, list[Tensor]] = {t: [] for t in codec.temperatures if draws}
    for start in range(0, len(hidden_ND), step):
        chunk = slice(start, start + step)
        logits_NV = logits_of(chunk)
        for temperature, ids in drawn.items():
            ids.append(draw(logits_NV, temperature, torch.from_numpy(uniform.random((len(logits_NV), draws)))))
        for first in range(0, len(logits_NV), block):
            part = slice(start + first, min(start + first + block, start + len(logits_NV)))
            codes, count = codec.encode(hidden_ND[part], logits_NV[first : first + block], labels_N[part])
            parts.append(codes)
            saturated += int(count)
    tail_type = "int8" if codec.tail_bits == 8 else "int16"
    tail = numpy_of(torch.cat([p.tail_codes for p in parts]), tail_type)
    rows = {
        "distribution/scalars": numpy_of(torch.cat([p.scalars for p in parts]), "float16"),
        "distribution/head_ids": numpy_of(torch.cat([p.head_ids for p in parts]), id_dtype(codec.vocab_size)),
        "distribution/head_codes": numpy_of(
            torch.cat([p.head_codes for p in parts]), "uint8" if codec.head_bits == 8 else "uint16"
        ),
        "distribution/tail_codes": to_zigzag(tail.astype(np.int8, copy=False)) if zigzag else tail,
        **{sampled_path(temperature): numpy_of(torch.cat(ids), id_dtype(codec.vocab_size)) for temperature, ids in drawn.items()},
    }
    codes_per_row = codec.head + codec.rank
    rows = {path: array for path, array in rows.items() if array.shape[1]}
    return Extracted(rows, {"distribution": (saturated, len(hidden_ND) * codes_per_row)})


def draw(logits_NV: Tensor, temperature: float, uniform_Nn: Tensor) -> Tensor:
    """int64 ids [N, n], ascending: one for each number in [0, 1), by the inverse of the softened distribution's cumulative sum."""
    cumulative_NV = (logits_NV / temperature).softmax(1).double().cumsum(1)
    wanted = uniform_Nn.to(cumulative_NV) * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, wanted, right=True).clamp(max=logits_NV.shape[1] - 1).sort(1).values
