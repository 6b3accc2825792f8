"""The low-rank basis of the distribution's tail, fitted in calibration.

The basis minimises the expected squared error of the logits, each token weighted by the mass the teacher gives it outside the
head (averaged over the softened distributions, mixed with uniform so that no direction is lost): with W the output head
centred by those weights and M = Wᵀ diag(w) W = L Lᵀ, it is the PCA of (h - μ)L. Only the fit is centred: decoding uses the
head's full rows, because a trained head carries a common shift.

One quantisation step serves all directions, as rate-distortion theory has it: an error weighs the same wherever it is made, and
a direction that moves less than half a step costs nothing. So `rank: auto` searches the coarsest step that meets the bounds, and
the rank follows. Legend: n calibration tokens, D width, V vocabulary, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import DistributionCodec
from signal_store.signals import DistributionSignal

UNIFORM_SHARE = 0.1
WEIGHT_TOKENS = 1024
"""Calibration tokens that the weights of the vocabulary are averaged over; more moves nothing (tools/bench/LOG.md)."""
REACH_TOKENS = 8192
LARGEST_HEAD = 128
"""Whose reach is looked at in any case."""
CHUNK = 8192
"""Rows of a float32 product, whose sums are added up in float64."""
QUANTISATION_SHARE = 0.25
"""Error that the step may add, as a share of the error that a rank given by the recipe makes."""
SATURATION_QUANTILE = 0.9999
MARGIN = 1.5
"""Calibration sees few tokens; the largest code seen gets this much more room."""
PRODUCT_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}
"""Of the logits of one chunk of tokens."""


def logit_chunks(hidden_nD: Tensor, head: OutputHead) -> Iterator[Tensor]:
    """The tokens on the head's device, some at a time, so that [n, V] is never held."""
    rows = max(1, PRODUCT_BYTES.get(head.weight.device.type, 2**24) // (4 * len(head.weight)))
    for part in hidden_nD.split(rows):
        yield part.to(head.weight.device)


@dataclass(frozen=True, slots=True)
class TailFit:
    """The full-rank fit: `mean` [D], `whiten` [D, D] (h - mean -> coordinates, heaviest first), `basis` [V, D] (coordinates ->
    logits), `bias` [V], the coordinates' variances `energy` [D], and their largest magnitudes but for a 10⁻⁴ `reach` [D].
    `distances` [n', k]: how far the i-th largest logit lies below the first, in nats. Small matrices lie on the CPU; `basis` and
    `bias` on the head's device."""

    mean: Tensor
    whiten: Tensor
    basis: Tensor
    bias: Tensor
    energy: Tensor
    reach: Tensor
    distances: Tensor

    @classmethod
    def of(cls, hidden_nD: Tensor, head: OutputHead, signal: DistributionSignal) -> Self:
        """Fit on calibration tokens. Products over tokens or vocabulary are float32 on the head's device, what is left is [D, D]
        and float64 on the CPU."""
        weight_V, distances = _token_weights(_spread(hidden_nD, WEIGHT_TOKENS), head, signal)
        head_VD = head.weight.float() * head.scale
        centred_VD = head_VD - weight_V @ head_VD
        metric_DD = _gram(centred_VD, weight_n=weight_V, device=head_VD.device)
        ridge = 1e-6 * metric_DD.diagonal().mean()
        lower_DD = torch.linalg.cholesky(metric_DD + ridge * torch.eye(len(metric_DD), dtype=torch.float64))
        mean = hidden_nD.double().mean(0)
        covariance_DD = _gram(hidden_nD, mean, device=head_VD.device) / len(hidden_nD)
        energy, directions = torch.linalg.eigh(lower_DD.T @ covariance_DD @ lower_DD)
        order = energy.argsort(descending=True)
        energy, directions = energy[order].clamp(min=0), directions[:, order]
        whiten_DD = lower_DD @ directions
        restore = torch.linalg.solve_triangular(lower_DD.T, directions, upper=True).T
        coordinates = (_spread(hidden_nD, REACH_TOKENS).double() - mean) @ whiten_DD
        reach = coordinates.abs().quantile(SATURATION_QUANTILE, dim=0) * MARGIN
        bias = 0.0 if head.bias is None else head.bias.float() * head.scale
        return cls(
            mean,
            whiten_DD,
            head_VD @ restore.T.float().to(head_VD),
            head_VD @ mean.float().to(head_VD) + bias,
            energy,
            reach,
            distances,
        )

    def codec_of_rank(self, rank: int, signal: DistributionSignal, softcap: float | None) -> DistributionCodec:
        """The codec with the first `rank` directions, its step in proportion to what they leave out."""
        residual = self.energy[rank:].sum()
        return self.codec(rank, float((12 * QUANTISATION_SHARE * residual / max(1, rank)).sqrt()), signal, softcap)

    def codec_of_step(self, step: float, signal: DistributionSignal, softcap: float | None) -> DistributionCodec:
        """The codec with one step, and every direction that ever moves half of it."""
        return self.codec(max(1, int((self.reach >= step / 2).sum())), step, signal, softcap)

    def codec(self, rank: int, step: float, signal: DistributionSignal, softcap: float | None) -> DistributionCodec:
        """The codec with a rank and a step; a direction that would not fit into its codes gets a larger step."""
        limit = 2 ** (signal.tail_bits - 1) - 1
        reach = self.distances[:, max(0, signal.head_size - 1)].quantile(SATURATION_QUANTILE)
        return DistributionCodec(
            temperatures=signal.temperatures,
            head=signal.head_size,
            head_bits=signal.head_bits,
            tail_bits=signal.tail_bits,
            head_range=float((reach * MARGIN).clamp(min=1.0)),
            softcap=softcap,
            mean=self.mean.float(),
            encode_matrix=self.whiten[:, :rank].float().contiguous(),
            tail_step=(self.reach[:rank] / limit).clamp(min=max(step, 1e-12)).float(),
            tail_basis=self.basis[:, :rank],
            tail_bias=self.bias,
        )


def _gram(rows_nD: Tensor, mean: Tensor | float = 0.0, *, device: torch.device, weight_n: Tensor | None = None) -> Tensor:
    """(Rows - mean)ᵀ diag(weight) (rows - mean) [D, D], float64 on the CPU; products of a chunk of rows are float32, on the
    device."""
    total = torch.zeros(rows_nD.shape[1], rows_nD.shape[1], dtype=torch.float64)
    for start in range(0, len(rows_nD), CHUNK):
        part = (rows_nD[start : start + CHUNK] - mean).float().to(device)
        weighted = part if weight_n is None else part * weight_n[start : start + CHUNK, None]
        total += (part.T @ weighted).double().cpu()
    return (total + total.T) / 2


def _spread(rows_nD: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spread."""
    return rows_nD[torch.linspace(0, len(rows_nD) - 1, min(most, len(rows_nD))).round().long()]


def _token_weights(hidden_nD: Tensor, head: OutputHead, signal: DistributionSignal) -> tuple[Tensor, Tensor]:
    """w [V], summing to 1, on the head's device: the mean mass outside the head (of its middle size, where it is to be chosen); and
    the `distances`."""
    sizes = signal.head_sizes(len(head.weight))
    head_size = sizes[len(sizes) // 2]
    total = torch.zeros(len(head.weight), dtype=torch.float64)
    distances = []
    for chunk in logit_chunks(hidden_nD, head):
        logits = head.logits(chunk)
        top, ids = logits.topk(min(max(LARGEST_HEAD, *sizes), logits.shape[1]), 1)
        for temperature in signal.temperatures:
            p = (logits / temperature).softmax(-1)
            total += p.scatter_(1, ids[:, :head_size], 0).sum(0).double().cpu()
        distances.append((top[:, :1] - top).cpu())
    weight = (1 - UNIFORM_SHARE) * total / total.sum().clamp(min=1e-30) + UNIFORM_SHARE / len(total)
    return weight.float().to(head.weight.device), torch.cat(distances).double()


def headless_codec(logits_nV: Tensor, signal: DistributionSignal) -> tuple[DistributionCodec, tuple[float, ...]]:
    """The codec of a teacher whose logits are all there is: no tail; and the mean mass of its head at each temperature."""
    top_nk, _ = logits_nV.topk(max(1, signal.head_size), 1)
    distance = (top_nk[:, 0] - top_nk[:, -1]).double().quantile(SATURATION_QUANTILE)
    mass = tuple(
        float((top_nk / t).logsumexp(1).sub((logits_nV / t).logsumexp(1)).exp().mean()) if signal.head_size else 0.0
        for t in signal.temperatures
    )
    vocab = logits_nV.shape[1]
    codec = DistributionCodec(
        temperatures=signal.temperatures,
        head=signal.head_size,
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
