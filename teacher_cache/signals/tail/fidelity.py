"""How faithful codecs are, measured on held-out tokens of calibration: several codecs in one pass, on the device of the teacher's
head.

The gradient is that of forward KL with respect to an output head which reads the teacher's hidden states and knows only how
frequent tokens are: Σ (u - p) hᵀ, u the mean of p, summed over a part of PART_TOKENS tokens (a step of a student). It has [V, D]
numbers, of which only lengths and angles are wanted: rows of the vocabulary are given random signs and added up by their number
modulo SKETCH (a count sketch), which leaves [SKETCH, D] and squared lengths unbiased within √(2 / SKETCH), 4 % of themselves, 2 %
of an angle. Means are over the parts, and so are the standard errors, which hold the sketch's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import DistributionCodec, DistributionCodes
from teacher_cache.signals.tail.basis import logit_chunks

PART_TOKENS = 1024
SKETCH = 1024
BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Of the logits that are compared at a time: what stays in a core's cache; a GPU takes whole chunks."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Per cached temperature: mean KL(teacher‖cached) in nats, times T²; the gradient's angle in degrees; the head's mass. The
    errors are standard errors of the means; there are none of a single part."""

    scaled_kl_nats: tuple[float, ...]
    angle_degrees: tuple[float, ...]
    head_mass: tuple[float, ...]
    scaled_kl_error: tuple[float, ...]
    angle_error: tuple[float, ...]

    def excess(self, max_scaled_kl_nats: float, max_angle_degrees: float) -> tuple[float, float]:
        """The worst of all temperatures as shares of the two bounds: above 1 is out of bounds."""
        return max(self.scaled_kl_nats) / max_scaled_kl_nats, max(self.angle_degrees) / max_angle_degrees


def measure(codecs: Sequence[DistributionCodec], head: OutputHead, hidden_nD: Tensor) -> list[Fidelity]:
    """Cached against true distributions, one answer a codec. The codecs have the same temperatures."""
    number = max(1, round(len(hidden_nD) / PART_TOKENS))
    parts = [_measure_part(codecs, head, part) for part in hidden_nD.tensor_split(number)]
    return [_mean([part[i] for part in parts]) for i in range(len(codecs))]


def _mean(parts: list[Fidelity]) -> Fidelity:
    def moments(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        values = torch.tensor([getattr(part, name) for part in parts], dtype=torch.float64)
        errors = (values.std(0) / math.sqrt(len(parts))).tolist() if len(parts) > 1 else []
        return tuple(values.mean(0).tolist()), tuple(errors)

    kl, kl_error = moments("scaled_kl_nats")
    angle, angle_error = moments("angle_degrees")
    return Fidelity(kl, angle, moments("head_mass")[0], kl_error, angle_error)


@dataclass(slots=True)
class _Sums:
    """Of one codec at one temperature, over a part: Σ KL, Σ head mass, and the sketched rows of (p - q)."""

    kl: float
    mass: float
    rows: list[Tensor]


@torch.inference_mode()
def _measure_part(codecs: Sequence[DistributionCodec], head: OutputHead, hidden_nD: Tensor) -> list[Fidelity]:
    device, temperatures = head.weight.device, codecs[0].temperatures
    codecs = [codec.to(device) for codec in codecs]
    unigrams = _unigrams(head, hidden_nD, temperatures) if any(not codec.rank for codec in codecs) else {}
    signs_V = torch.randint(2, (len(head.weight),), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).float().to(device)
    true: dict[float, list[Tensor]] = {t: [] for t in temperatures}
    sums = [{t: _Sums(0.0, 0.0, []) for t in temperatures} for _ in codecs]
    block = max(1, BLOCK_BYTES.get(device.type, 2**21) // (4 * len(head.weight)))
    for chunk in logit_chunks(hidden_nD, head):
        logits, tails = head.logits(chunk), _tail_logits(codecs, chunk)
        for start in range(0, len(chunk), block):
            rows = slice(start, start + block)
            parts = [None if tail is None else tail[rows] for tail in tails]
            _compare(codecs, chunk[rows], logits[rows], parts, unigrams, signs_V, true, sums)
    hidden = hidden_nD.float().to(device)
    exact = {t: _centred(torch.cat(rows)).T @ hidden for t, rows in true.items()}
    return [
        Fidelity(
            tuple(t**2 * one[t].kl / len(hidden) for t in temperatures),
            tuple(_angle(-exact[t], torch.cat(one[t].rows).T @ hidden) for t in temperatures),
            tuple(one[t].mass / len(hidden) for t in temperatures),
            (),
            (),
        )
        for one in sums
    ]


def _tail_logits(codecs: Sequence[DistributionCodec], hidden_nD: Tensor) -> list[Tensor | None]:
    """Of each codec the decoded logits of its tail; codecs that differ in their heads alone share one."""
    found: dict[tuple[float, ...], Tensor] = {}
    keys = [tuple(codec.tail_step.tolist()) for codec in codecs]
    for key, codec in zip(keys, codecs, strict=True):
        if codec.rank and key not in found:
            tail, _ = codec.encode_tail(hidden_nD)
            nothing = tail[:, :0]
            found[key] = codec.tail_logits(DistributionCodes(nothing, nothing, tail, nothing))
    return [found.get(key) for key in keys]


def _compare(
    codecs: Sequence[DistributionCodec],
    hidden_bD: Tensor,
    logits_bV: Tensor,
    tails: list[Tensor | None],
    unigrams: dict[float, Tensor],
    signs_V: Tensor,
    true: dict[float, list[Tensor]],
    sums: list[dict[float, _Sums]],
) -> None:
    """Add a block of tokens to the sums."""
    exact = {}
    for temperature in true:
        logp = (logits_bV / temperature).log_softmax(1)
        exact[temperature] = logp, logp.exp()
        true[temperature].append(fold(exact[temperature][1] * signs_V))
    unknown = torch.full((len(hidden_bD),), -1, device=hidden_bD.device)
    heads: dict[int, DistributionCodes] = {}
    for codec, tail, own in zip(codecs, tails, sums, strict=True):
        if codec.head not in heads:
            heads[codec.head] = codec.encode(hidden_bD, logits_bV.clone(), unknown)[0]
        for temperature, (logp, p) in exact.items():
            shape = unigrams[temperature].log().repeat(len(hidden_bD), 1) if tail is None else tail / temperature
            logq, q = codec.known(heads[codec.head], temperature).softened(shape)
            found = own[temperature]
            found.kl += float(logq.neg_().add_(logp).mul_(p).sum())
            found.mass += float(heads[codec.head].scalars[:, codec.mass_column(temperature)].float().sigmoid().sum())
            found.rows.append(fold(q.neg_().add_(p).mul_(signs_V)))


def _unigrams(head: OutputHead, hidden_nD: Tensor, temperatures: tuple[float, ...]) -> dict[float, Tensor]:
    """The mean of p by temperature: the shape that a tail without directions is given here."""
    total = {t: torch.zeros(len(head.weight), device=head.weight.device) for t in temperatures}
    for chunk in logit_chunks(hidden_nD, head):
        logits = head.logits(chunk)
        for temperature, sum_V in total.items():
            sum_V += (logits / temperature).softmax(1).sum(0)
    return {t: sum_V / len(hidden_nD) for t, sum_V in total.items()}


def fold(rows_bV: Tensor) -> Tensor:
    """[b, min(V, SKETCH)]: columns added up by their number modulo SKETCH."""
    whole = len(rows_bV[0]) // SKETCH * SKETCH
    if not whole:
        return rows_bV.clone()
    folded: Tensor = rows_bV[:, :whole].unflatten(1, (-1, SKETCH)).sum(1)
    folded[:, : rows_bV.shape[1] - whole] += rows_bV[:, whole:]
    return folded


def _centred(rows_nm: Tensor) -> Tensor:
    centred: Tensor = rows_nm - rows_nm.mean(0)
    return centred


def _angle(true_mD: Tensor, error_mD: Tensor) -> float:
    """Degrees between a gradient and the same with an error added."""
    u, error = true_mD.flatten().double(), error_mD.flatten().double()
    along = (u @ error) / u.square().sum().clamp(min=1e-300)
    across = (error - along * u).norm()
    return float(torch.rad2deg(torch.atan2(across, (1 + along) * u.norm())))
