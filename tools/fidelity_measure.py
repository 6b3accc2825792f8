"""How faithful a cached distribution is, on a cache's own validation tokens. Loads the teacher.

Against the teacher's full distribution: mean KL(teacher ‖ cached) in nats, the error of probabilities, and the angle and the ratio
of norms between the cached and the full-vocabulary gradient with respect to a student's output head, summed over all tokens, for
each divergence. Legend: N tokens, V vocabulary, D width of the student.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model_taps.head import OutputHead, final_hidden, output_head
from model_taps.loading import load_model
from signal_store.cache import Cache
from signal_store.codecs.distribution import DistributionCodec, DistributionCodes
from student_train.data.codecs import Codecs
from student_train.data.collate import collate
from student_train.data.request import SignalRequest
from student_train.data.signals.distribution import DistributionPart, DistributionRequest

CHUNK = 512
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class HeldOut:
    """N validation tokens: what both heads read [N, D], the cached codes, and the labels [N] (-100 where not stored)."""

    hidden_teacher: Tensor
    hidden_student: Tensor
    head_teacher: OutputHead
    head_student: OutputHead
    labels: Tensor
    codes: DistributionCodes
    codec: DistributionCodec

    def __len__(self) -> int:
        return len(self.labels)

    def chunks(self) -> Iterator[slice]:
        """The tokens, some hundred at a time."""
        yield from (slice(start, min(start + CHUNK, len(self))) for start in range(0, len(self), CHUNK))

    @cached_property
    def vocab(self) -> int:
        """V."""
        return self.codec.vocab_size

    def teacher_logits(self, rows: slice) -> Tensor:
        """[n, V] float32."""
        return self.head_teacher.logits(self.hidden_teacher[rows])[:, : self.vocab]

    def student_logits(self, rows: slice) -> Tensor:
        """[n, V] float32."""
        return self.head_student.logits(self.hidden_student[rows])[:, : self.vocab]


@torch.no_grad()
def held_out(cache: Cache, teacher_folder: str, student_folder: str, min_tokens: int) -> HeldOut:
    """At least `min_tokens` tokens of the validation split, one segment a row, through both models."""
    teacher = load_model(teacher_folder, what="teacher", dtype=getattr(torch, cache.manifest.teacher.dtype))
    student = load_model(student_folder, what="student", dtype=torch.float32)
    request = SignalRequest.of(DistributionRequest())
    codec = Codecs.of(cache, request, torch.device("cpu")).distribution
    assert codec is not None
    rows, tokens = [], 0
    for unit in cache.units("validation"):
        (loaded,) = request.load(cache, [int(unit)])
        for segment, length in enumerate(loaded.segments["length"]):
            rows.append([(loaded, segment)])
            tokens += int(length)
            if tokens >= min_tokens:
                break
    batch = collate(rows, cache.manifest.plan.context, request, packed=False, cursor={})
    part = batch.part(DistributionPart)
    assert part is not None
    hidden = [
        torch.cat([final_hidden(model, ids, None) for ids in batch.input_ids.split(16)]).flatten(0, 1)[batch.flat]
        for model in (teacher, student)
    ]
    heads = output_head(teacher).float(), output_head(student)
    return HeldOut(hidden[0], hidden[1], heads[0], heads[1], batch.labels, part.codes, codec)


CachedLogprobs = Callable[[slice, float, Tensor], Tensor]
"""From rows, temperature and the student's softened logits [n, V] to the cached log p_T [n, V]."""


def cached_logprobs(held: HeldOut, codec: DistributionCodec, codes: DistributionCodes) -> CachedLogprobs:
    """What a reader reconstructs."""

    def logprobs(rows: slice, temperature: float, scaled_NV: Tensor) -> Tensor:
        return codec.logprobs(codes[rows], temperature, None if codec.rank else scaled_NV[:, : held.vocab].clone())

    return logprobs


@dataclass(frozen=True, slots=True)
class TemperatureFidelity:
    """At one temperature, over `tokens` tokens. Angles in degrees and ratios of norms by divergence."""

    mean_kl_nats: float
    mean_total_variation: float
    max_error: float
    angle_degrees: dict[str, float]
    norm_ratio: dict[str, float]
    tokens: int


def logit_gradient(divergence: str, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """[N, V]: gradient of the divergence with respect to the student's softened logits, p the teacher's and q the student's
    JSD with β = ½."""
    q = logq_NV.exp()
    if divergence == "forward_kl":
        return q - logp_NV.exp()
    if divergence == "reverse_kl":
        inner = logq_NV - logp_NV
        return q * (inner - (q * inner).sum(1, keepdim=True))
    mixture = torch.logaddexp(logp_NV, logq_NV) - np.log(2.0)
    inner = logq_NV - mixture
    gradient: Tensor = 0.5 * q * (inner - (q * inner).sum(1, keepdim=True))
    return gradient


@torch.no_grad()
def measure(held: HeldOut, cached: CachedLogprobs, temperatures: tuple[float, ...]) -> dict[float, TemperatureFidelity]:
    """Fidelity by temperature."""
    found = {}
    width = held.hidden_student.shape[1]
    for temperature in temperatures:
        full = {d: torch.zeros(held.vocab, width) for d in DIVERGENCES}
        ours = {d: torch.zeros(held.vocab, width) for d in DIVERGENCES}
        kl, variation, worst = 0.0, 0.0, 0.0
        for rows in held.chunks():
            logp = (held.teacher_logits(rows) / temperature).log_softmax(1)
            scaled = held.student_logits(rows) / temperature
            logc = cached(rows, temperature, scaled)
            error = logp.exp() - logc.exp()
            kl += float((logp.exp() * (logp - logc)).sum())
            variation += float(error.abs().sum()) / 2
            worst = max(worst, float(error.abs().max()))
            logq = scaled.log_softmax(1)
            for divergence in DIVERGENCES:
                full[divergence] += logit_gradient(divergence, logp, logq).T @ held.hidden_student[rows]
                ours[divergence] += logit_gradient(divergence, logc, logq).T @ held.hidden_student[rows]
        found[temperature] = TemperatureFidelity(
            kl / len(held),
            variation / len(held),
            worst,
            {d: angle(full[d], ours[d]) for d in DIVERGENCES},
            {d: float(ours[d].norm() / full[d].norm()) for d in DIVERGENCES},
            len(held),
        )
    return found


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two tensors, by atan2, which keeps small angles."""
    u, v = a.flatten().double() / a.norm(), b.flatten().double() / b.norm()
    return float(torch.rad2deg(2 * torch.atan2((u - v).norm(), (u + v).norm())))


def bytes_per_token(cache: Cache, depth: int = 1) -> dict[str, float]:
    """Stored bytes per token by the first `depth` parts of an object's key, and `total` of everything."""
    sizes: dict[str, int] = {}
    for part in cache.parts:
        for key in part.objects.list(""):
            name = "/".join(key.split("/c/")[0].split("/")[:depth])
            sizes[name] = sizes.get(name, 0) + (part.objects.size(key) or 0)
    per_token = {name: size / cache.num_tokens for name, size in sorted(sizes.items())}
    return {**per_token, "total": float(np.sum(list(per_token.values())))}


def teacher_validation_loss(cache: Cache) -> float:
    """The teacher's own nats per token on the validation split, from the cached log-probabilities of the labels."""
    total, count = 0.0, 0
    for unit in cache.units("validation"):
        first = int(unit) * cache.manifest.plan.unit_tokens
        mask = cache.read("tokens/loss_mask", first, first + cache.manifest.plan.unit_tokens) == 1
        logp = cache.read("distribution/scalars", first, first + cache.manifest.plan.unit_tokens)[:, 1]
        total -= float(logp[mask].astype(np.float64).sum())
        count += int(mask.sum())
    return total / count


def demo_fidelity(
    cache: Cache, teacher: Path, student: Path, temperatures: tuple[float, ...], min_tokens: int
) -> dict[float, TemperatureFidelity]:
    """Of a cache as it stands."""
    held = held_out(cache, str(teacher), str(student), min_tokens)
    return measure(held, cached_logprobs(held, held.codec, held.codes), temperatures)
