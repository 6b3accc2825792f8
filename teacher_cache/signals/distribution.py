"""The distribution of every row of a batch, in chunks of rows, so that [tokens, vocabulary] is never held."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from signal_store.codecs.distribution import DistributionCodec
from signal_store.codecs.zigzag import to_zigzag
from signal_store.errors import InputError
from signal_store.format.grid import id_dtype
from signal_store.manifest import Manifest
from signal_store.signals import DistributionSignal
from signal_store.signals.distribution import sampled_path
from teacher_cache.signals.base import Arrays, CalibrationSample, Facts, Scale, SignalExtractor, Trial
from teacher_cache.signals.budget import FIT_TOKENS_PER_CHANNEL, held_out
from teacher_cache.signals.extracted import Extracted, numpy_of
from teacher_cache.signals.tail.basis import TailFit, headless_codec
from teacher_cache.signals.tail.choice import choose_codec
from teacher_cache.signals.tail.cost import fit_flops, search_flops
from teacher_cache.signals.unit_work import LOGITS_BYTES, SignalBatch
from teacher_cache.teacher.load import Teacher

ENCODE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Of the logits that are encoded at a time: what stays in a core's cache; a GPU takes the whole chunk."""
SEEN_BYTES = (40.0, 250.0)
"""What a token's codes have been seen to take, from a very small teacher to a wide one of full rank."""


class Prepared(NamedTuple):
    """The codec, and whether the cache holds its tail codes in zigzag."""

    codec: DistributionCodec
    zigzag: bool


class DistributionExtractor(SignalExtractor[DistributionSignal, Prepared]):
    """One row a token."""

    trial: ClassVar[Trial] = {"rank": 8, "head": 8}

    @property
    def needs_head(self) -> bool:
        """For a tail."""
        return self.section.rank != 0

    @property
    def one_row_per_token(self) -> bool:
        """Always."""
        return True

    def refuse_beyond(self, config: PretrainedConfig) -> None:
        """A rank above the teacher's width."""
        rank, width = self.section.rank, getattr(config, "hidden_size", None)
        if isinstance(rank, int) and width is not None and rank > width:
            where = "signals.distribution.rank"
            raise InputError("more than the teacher has", expected=f"at most {width}", found=rank, where=where)

    def collect(self, facts: Facts, batch: SignalBatch) -> tuple[Tensor, Tensor | None]:
        """float32 [n, D], what the head reads; of a teacher without one [n, V], its logits."""
        own, logits = torch.from_numpy(~batch.is_context), batch.outputs.logits
        return batch.outputs.hidden.float().cpu()[own], None if logits is None else logits.cpu()[own]

    def fit(self, facts: Facts, collected: Sequence[Any], sample: CalibrationSample) -> tuple[Facts, Arrays]:
        """The codec, fitted on a part of the sample and measured on the rest."""
        signal, head = self.section, sample.teacher.head
        if signal.head != "auto":
            signal = signal.model_copy(update={"head": min(signal.head, sample.teacher.vocab_size)})
        if head is None:
            codec, coverage = headless_codec(torch.cat([logits for _, logits in collected]), signal)
            return {"head": codec.head, "tail_rank": 0, "coverage": list(coverage)}, codec.to_arrays()
        final = [hidden for hidden, _ in collected]
        held = held_out([len(hidden) for hidden in final], sample.held_out_share)
        fit_nD = torch.cat([hidden for hidden, out in zip(final, held, strict=True) if not out])
        held_nD = torch.cat([hidden for hidden, out in zip(final, held, strict=True) if out] or final)
        try:
            choice = choose_codec(TailFit.of(fit_nD, head, signal), head, signal, held_nD)
        except InputError as error:
            raise _little_text(sample) or error from error
        found: dict[str, Any] = {name: list(values) for name, values in asdict(choice.fidelity).items() if name != "head_mass"}
        found |= {"tokens": choice.tokens, "bytes_per_token": choice.bytes_per_token}
        return {
            "head": choice.codec.head,
            "tail_rank": choice.codec.rank,
            "tail_zigzag": True,
            "coverage": list(choice.fidelity.head_mass),
            "fidelity": found,
        }, choice.codec.to_arrays()

    def document(self, facts: Facts) -> dict[str, Any]:
        """Each for itself."""
        return dict(facts)

    def settled(self, document: Mapping[str, Any], vocab_size: int) -> DistributionSignal:
        """With a head that is a number."""
        head = document["head"] if "head" in document else min(self.section.head_size, vocab_size)
        return self.section.model_copy(update={"head": head})

    def prepare(self, facts: Facts, manifest: Manifest, arrays: Arrays, teacher: Teacher) -> Prepared:
        """The codec of the calibration."""
        codec = DistributionCodec.from_arrays(arrays, self.section, manifest.teacher.logit_softcap)
        zigzag = any(spec.path == "distribution/tail_codes" and spec.dtype == "uint8" for spec in manifest.specs)
        return Prepared(codec.to(teacher.device), zigzag)

    def extract(self, prepared: Prepared, batch: SignalBatch) -> Extracted:
        """Codes of all rows; what is drawn is drawn by unit and place."""
        key, hidden = (batch.work.number, batch.tokens.start), batch.outputs.hidden
        draws, zigzag = self.section.samples, prepared.zigzag
        return extract_distribution(prepared.codec, batch.logits, hidden, batch.labels, draws, key, zigzag=zigzag)

    def bytes_per_token(self, scale: Scale) -> tuple[float, float]:
        """As seen; ids that are drawn for each temperature."""
        drawn = self.section.samples * len(self.section.temperatures)
        return SEEN_BYTES[0] + 0.5 * drawn, SEEN_BYTES[1] + 4 * drawn

    def calibration_flops(self, width: int, vocab_size: int, tokens: int, held_out_share: float) -> float:
        """Of the tail's basis and the search for the codec."""
        if self.section.rank == 0:
            return 0.0
        held = round(tokens * held_out_share)
        heads, temperatures = len(self.section.head_sizes(vocab_size)), len(self.section.temperatures)
        return fit_flops(width, vocab_size, tokens - held) + search_flops(width, vocab_size, held, heads, temperatures)


def _little_text(sample: CalibrationSample) -> InputError | None:
    """What is the matter where no codec is within the bounds and calibration read this little; None where it read enough."""
    least = FIT_TOKENS_PER_CHANNEL[0] * sample.teacher.identity.hidden_size
    if sample.num_tokens >= least:
        return None
    there = sample.available_tokens
    return InputError(
        "too little text to fit the distribution's codec on",
        expected=f"{least:,} tokens or more in calibration",
        found=f"{sample.num_tokens:,}, of {there:,} in all sources",
        remedy="Give the sources more text" + ("" if there < least else ", or raise calibration.tokens_per_source") + ".",
    )


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
