"""The low-rank basis of the distribution's tail, fitted in calibration (DESIGN 5).

The basis minimises the expected squared error of the logits, each token weighted by the mass the teacher gives it outside the
head (averaged over the softened distributions, mixed with uniform so that no direction is lost): with W the output head
centred by those weights and M = Wᵀ diag(w) W = L Lᵀ, it is the PCA of (h - μ)L. Only the fit is centred: decoding uses the
head's full rows, because a trained head carries a common shift.

One quantisation step serves all directions, as rate-distortion theory has it: an error weighs the same wherever it is made, and
a direction that moves less than half a step costs nothing. So `rank: auto` searches the coarsest step that meets the bounds, and
the rank follows. Legend: n calibration tokens, D width, V vocabulary, r rank.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.distribution_codec import DistributionCodec
from signal_store.errors import InputError
from signal_store.signals import DistributionSignal

UNIFORM_SHARE = 0.1
QUANTISATION_SHARE = 0.25
"""Error that the step may add, as a share of the error that a rank given by the recipe makes."""
STEPS_PER_OCTAVE = 8
OCTAVES = 12
SATURATION_QUANTILE = 0.9999
MARGIN = 1.5
"""Calibration sees few tokens; the largest code seen gets this much more room."""


@dataclass(frozen=True, slots=True)
class TailFit:
    """The full-rank fit: `mean` [D], `whiten` [D, D] (h - mean -> coordinates, heaviest first), its inverse `restore`, the
    coordinates' variances `energy` [D], and their largest magnitudes but for a 10⁻⁴ `reach` [D]."""

    mean: Tensor
    whiten: Tensor
    restore: Tensor
    energy: Tensor
    reach: Tensor
    head_range: float

    @classmethod
    def of(cls, hidden_nD: Tensor, head: OutputHead, signal: DistributionSignal) -> Self:
        """Fit on calibration tokens, in float64."""
        weight_V, head_range = _token_weights(hidden_nD, head, signal)
        head_VD = head.weight.double() * head.scale
        centred_VD = head_VD - weight_V @ head_VD
        metric_DD = centred_VD.T @ (weight_V[:, None] * centred_VD)
        ridge = 1e-6 * metric_DD.diagonal().mean()
        lower_DD = torch.linalg.cholesky(metric_DD + ridge * torch.eye(len(metric_DD), dtype=torch.float64))
        mean = hidden_nD.double().mean(0)
        coordinates = (hidden_nD.double() - mean) @ lower_DD
        energy, directions = torch.linalg.eigh(coordinates.T @ coordinates / len(coordinates))
        order = energy.argsort(descending=True)
        energy, directions = energy[order].clamp(min=0), directions[:, order]
        restore = torch.linalg.solve_triangular(lower_DD.T, directions, upper=True).T
        reach = (coordinates @ directions).abs().quantile(SATURATION_QUANTILE, dim=0) * MARGIN
        return cls(mean, lower_DD @ directions, restore, energy, reach, head_range)

    def codec_of_rank(self, rank: int, head: OutputHead, signal: DistributionSignal) -> DistributionCodec:
        """The codec with the first `rank` directions, its step in proportion to what they leave out."""
        residual = self.energy[rank:].sum()
        return self.codec(rank, float((12 * QUANTISATION_SHARE * residual / max(1, rank)).sqrt()), head, signal)

    def codec_of_step(self, step: float, head: OutputHead, signal: DistributionSignal) -> DistributionCodec:
        """The codec with one step, and every direction that ever moves half of it."""
        return self.codec(max(1, int((self.reach >= step / 2).sum())), step, head, signal)

    def codec(self, rank: int, step: float, head: OutputHead, signal: DistributionSignal) -> DistributionCodec:
        """The codec with a rank and a step; a direction that would not fit into its codes gets a larger step."""
        limit = 2 ** (signal.tail_bits - 1) - 1
        head_VD = head.weight.double() * head.scale
        bias = torch.zeros(len(head_VD), dtype=torch.float64) if head.bias is None else head.bias.double() * head.scale
        return DistributionCodec(
            temperatures=signal.temperatures,
            head=signal.head,
            head_bits=signal.head_bits,
            tail_bits=signal.tail_bits,
            head_range=self.head_range,
            softcap=head.softcap,
            mean=self.mean.float(),
            encode_matrix=self.whiten[:, :rank].float().contiguous(),
            tail_step=(self.reach[:rank] / limit).clamp(min=max(step, 1e-12)).float(),
            tail_basis=(head_VD @ self.restore[:rank].T).float(),
            tail_bias=(head_VD @ self.mean + bias).float(),
        )


def _token_weights(hidden_nD: Tensor, head: OutputHead, signal: DistributionSignal) -> tuple[Tensor, float]:
    """w [V], float64, summing to 1; and the head's range in nats."""
    total = torch.zeros(len(head.weight), dtype=torch.float64)
    distances = []
    for chunk in hidden_nD.split(512):
        logits = head.logits(chunk)
        top, ids = logits.topk(min(max(1, signal.head), logits.shape[1]), 1)
        for temperature in signal.temperatures:
            p = (logits / temperature).softmax(-1)
            total += (p.scatter(1, ids, 0) if signal.head else p).sum(0).double()
        distances.append((top[:, :1] - top[:, -1:]).flatten())
    reach = torch.cat(distances).double().quantile(SATURATION_QUANTILE)
    uniform = torch.full_like(total, 1 / len(total))
    return (1 - UNIFORM_SHARE) * total / total.sum().clamp(min=1e-30) + UNIFORM_SHARE * uniform, float(
        (reach * MARGIN).clamp(min=1.0)
    )


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Per cached temperature: mean KL(teacher‖cached) in nats, times T²; the gradient's angle in degrees; the head's mass."""

    scaled_kl_nats: tuple[float, ...]
    angle_degrees: tuple[float, ...]
    head_mass: tuple[float, ...]

    def within(self, signal: DistributionSignal) -> bool:
        """Whether both bounds of the recipe hold at every temperature."""
        return max(self.scaled_kl_nats) <= signal.max_scaled_kl_nats and max(self.angle_degrees) <= signal.max_angle_degrees


@torch.inference_mode()
def measure(codec: DistributionCodec, head: OutputHead, hidden_nD: Tensor, chunk: int = 512) -> Fidelity:
    """Cached against true distributions on held-out tokens.

    The gradient is that of forward KL with respect to an output head which reads the teacher's hidden states and knows only how
    frequent tokens are: Σ (u - p) hᵀ, u the mean of p.
    """
    kls, angles, masses = [], [], []
    for temperature in codec.temperatures:
        total = torch.zeros(len(head.weight), dtype=torch.float64)
        for part in hidden_nD.split(chunk):
            total += (head.logits(part) / temperature).softmax(-1).sum(0).double()
        unigram = (total / len(hidden_nD)).float()
        true, cached = (torch.zeros(len(head.weight), hidden_nD.shape[1]) for _ in range(2))
        kl, mass = 0.0, 0.0
        for part in hidden_nD.split(chunk):
            logits = head.logits(part)
            logp = (logits / temperature).log_softmax(-1)
            codes, _ = codec.encode(part, logits, torch.full((len(part),), -1))
            shape = None if codec.rank else unigram.log().repeat(len(part), 1)
            logq = codec.logprobs(codes, temperature, shape)
            kl += float((logp.exp() * (logp - logq)).sum())
            mass += float(codes.scalars[:, codec.mass_column(temperature)].float().sigmoid().sum())
            true += (unigram - logp.exp()).T @ part.float()
            cached += (unigram - logq.exp()).T @ part.float()
        cosine = torch.nn.functional.cosine_similarity(true.flatten().double(), cached.flatten().double(), 0)
        kls.append(temperature**2 * kl / len(hidden_nD))
        angles.append(float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))))
        masses.append(mass / len(hidden_nD))
    return Fidelity(tuple(kls), tuple(angles), tuple(masses))


def choose_codec(
    fit: TailFit, head: OutputHead, signal: DistributionSignal, held_out_nD: Tensor
) -> tuple[DistributionCodec, Fidelity]:
    """The codec of the recipe's rank; for `auto` the one with the coarsest step within both bounds, InputError if there is none."""
    if signal.rank != "auto":
        codec = fit.codec_of_rank(min(signal.rank, len(fit.mean)), head, signal)
        return codec, measure(codec, head, held_out_nD)
    coarsest = float(fit.energy[0].sqrt()) * 2
    low, high = 0, OCTAVES * STEPS_PER_OCTAVE
    found = None
    while low < high:
        middle = (low + high) // 2
        codec = fit.codec_of_step(coarsest * 2 ** (-middle / STEPS_PER_OCTAVE), head, signal)
        fidelity = measure(codec, head, held_out_nD)
        if fidelity.within(signal):
            found, high = (codec, fidelity), middle
        else:
            low = middle + 1
    if found is not None:
        return found
    fidelity = measure(fit.codec_of_step(coarsest * 2**-OCTAVES, head, signal), head, held_out_nD)
    raise InputError(
        "no rank meets the bounds of signals.distribution",
        expected=f"T²·KL of {signal.max_scaled_kl_nats} nats, an angle of {signal.max_angle_degrees} degrees",
        found=f"{max(fidelity.scaled_kl_nats):.2g} and {max(fidelity.angle_degrees):.2g} at full rank",
        remedy="Set tail_bits: 16 or a larger head, loosen the bounds, or give a rank.",
    )


def headless_codec(logits_nV: Tensor, signal: DistributionSignal) -> tuple[DistributionCodec, tuple[float, ...]]:
    """The codec of a teacher whose logits are all there is: no tail; and the mean mass of its head at each temperature."""
    top_nk, _ = logits_nV.topk(max(1, signal.head), 1)
    distance = (top_nk[:, 0] - top_nk[:, -1]).double().quantile(SATURATION_QUANTILE)
    mass = tuple(
        float((top_nk / t).logsumexp(1).sub((logits_nV / t).logsumexp(1)).exp().mean()) if signal.head else 0.0
        for t in signal.temperatures
    )
    vocab = logits_nV.shape[1]
    codec = DistributionCodec(
        temperatures=signal.temperatures,
        head=signal.head,
        head_bits=signal.head_bits,
        tail_bits=signal.tail_bits,
        head_range=float((distance * MARGIN).clamp(min=1.0)),
        softcap=None,
        mean=torch.zeros(0),
        encode_matrix=torch.zeros(0, 0),
        tail_step=torch.zeros(0),
        tail_basis=torch.zeros(vocab, 0),
        tail_bias=torch.zeros(vocab),
    )
    return codec, mass
