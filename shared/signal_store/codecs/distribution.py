"""The distribution signal: an exact head, a low-rank tail, true masses at each cached temperature.

Reconstruction at temperature T: the head is softmax(-distance / T) times its stored mass; the tail gets its stored mass,
shaped by softmax(ẑ / T) with the head's ids at -inf, ẑ = softcap(basis · y + bias) with y the dequantised tail codes.
Masses are stored as log(head mass / tail mass), never as a difference: with a sharp teacher 1 - Σ head comes out negative.
Legend: N tokens, V vocabulary, k head ids, r tail directions, D width of the teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from signal_store.codecs.bf16_units import bf16_units, has_bf16_units, two_halves
from signal_store.errors import MismatchError
from signal_store.signals import DistributionSignal
from signal_store.signals.distribution import SCALARS

PADDED_LOGIT = -1e30
LOG_NOTHING = -1e5
"""log of a mass of zero, which must stay finite: 0 · log 0 is 0."""
GROUPS = 512
"""Columns of the first look for the largest logits; each holds every 512th of them."""


def top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their ids, in falling order, as `torch.topk`; which of equal ones is not said.

    On a CPU three times as fast: the largest k lie in the k columns with the largest maxima.
    """
    rows = logits_NV.shape[1] // GROUPS
    if logits_NV.device.type != "cpu" or rows < 8 or not 0 < k <= GROUPS // 4:
        return logits_NV.topk(k, dim=1)
    grid_NRG = logits_NV[:, : rows * GROUPS].unflatten(1, (rows, GROUPS))
    column_Nk = grid_NRG.amax(1).topk(k, dim=1, sorted=False).indices
    inside_NRk = grid_NRG.gather(2, column_Nk[:, None].expand(-1, rows, -1))
    ids_NRk = torch.arange(rows, device=logits_NV.device)[:, None] * GROUPS + column_Nk[:, None]
    rest = torch.arange(rows * GROUPS, logits_NV.shape[1], device=logits_NV.device).expand(len(logits_NV), -1)
    candidates = torch.cat([inside_NRk.flatten(1), logits_NV[:, rows * GROUPS :]], 1)
    values_Nk, place_Nk = candidates.topk(k, dim=1)
    return values_Nk, torch.cat([ids_NRk.flatten(1), rest], 1).gather(1, place_Nk)


def _signed(tail_codes: Tensor) -> Tensor:
    """Tail codes as signed integers: uint8 is zigzag (`signal_store.codecs.zigzag`)."""
    if tail_codes.dtype != torch.uint8:
        return tail_codes
    return (tail_codes >> 1).view(torch.int8) ^ (tail_codes & 1).view(torch.int8).neg()


def apply_softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), or the logits where there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True, slots=True)
class DistributionCodes:
    """What is stored of N tokens: `head_ids` int32 [N, k] ascending, `head_codes` uint8 or int32 [N, k], `tail_codes` int8, int16,
    or uint8 as they are stored (`signal_store.codecs.zigzag`) [N, r], `scalars` float16
    [N, 3 + temperatures] (see `signals.distribution.SCALARS`)."""

    head_ids: Tensor
    head_codes: Tensor
    tail_codes: Tensor
    scalars: Tensor

    def __len__(self) -> int:
        return len(self.scalars)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(self.head_ids[rows], self.head_codes[rows], self.tail_codes[rows], self.scalars[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same codes on a device, copied without blocking."""
        parts = (self.head_ids, self.head_codes, self.tail_codes, self.scalars)
        return type(self)(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True, slots=True)
class KnownMasses:
    """Of N rows at one temperature, in nats: `ids` int64 [N, k] of the head and `log_head` [N, k] their log-probabilities,
    `log_tail` [N, 1] that of all other tokens together."""

    ids: Tensor
    log_head: Tensor
    log_tail: Tensor

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self.ids[rows], self.log_head[rows], self.log_tail[rows])

    def softened(self, tail_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(log p, p) [N, V], with one exponential: what `DistributionCodec.logprobs`, the slow twin, gives. `tail_NV` is
        overwritten."""
        log_head_Nk = self.log_head.to(tail_NV.dtype)
        tail_NV.scatter_(1, self.ids, PADDED_LOGIT)
        top_N1 = tail_NV.amax(1, keepdim=True)
        p_NV = (tail_NV - top_N1).exp_()
        total_N1 = p_NV.sum(1, keepdim=True)
        p_NV.mul_(self.log_tail.exp() / total_N1).scatter_(1, self.ids, log_head_Nk.exp())
        return tail_NV.add_(self.log_tail - total_N1.log() - top_N1).scatter_(1, self.ids, log_head_Nk), p_NV


@dataclass(frozen=True)
class DistributionCodec:
    """The calibrated constants. `mean` [D] and `encode_matrix` [D, r] lead from the final hidden state to tail coordinates;
    `tail_step` [r] quantises them; `tail_basis` [V, r] and `tail_bias` [V] lead to logits; `head_range` is the largest
    distance below a row's maximum (nats) that the head's codes reach."""

    temperatures: tuple[float, ...]
    head: int
    head_bits: int
    tail_bits: int
    head_range: float
    softcap: float | None
    mean: Tensor
    encode_matrix: Tensor
    tail_step: Tensor
    tail_basis: Tensor
    tail_bias: Tensor

    @property
    def rank(self) -> int:
        """r, the number of tail directions."""
        return self.tail_basis.shape[1]

    @property
    def head_levels(self) -> int:
        """The largest head code, of square-root steps: fine near the row's maximum, where the probability is."""
        return (1 << self.head_bits) - 2

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the distribution."""
        return self.tail_basis.shape[0]

    def to_arrays(self) -> dict[str, NDArray[np.float32]]:
        """The constants as float32 arrays by name, for the calibration file."""
        tensors = {name: getattr(self, name) for name in ("mean", "encode_matrix", "tail_step", "tail_basis", "tail_bias")}
        arrays = {f"distribution/{name}": t.detach().cpu().float().numpy() for name, t in tensors.items()}
        return {**arrays, "distribution/head_range": np.asarray([self.head_range], dtype=np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float32]], signal: DistributionSignal, softcap: float | None) -> Self:
        """The inverse of `to_arrays`."""
        names = ("mean", "encode_matrix", "tail_step", "tail_basis", "tail_bias")
        tensors = {name: torch.from_numpy(np.array(arrays[f"distribution/{name}"])) for name in names}
        head_range = float(arrays["distribution/head_range"][0])
        return cls(signal.temperatures, signal.head_size, signal.head_bits, signal.tail_bits, head_range, softcap, **tensors)

    def to(self, device: torch.device | str) -> Self:
        """The constants on a device."""
        names = ("mean", "encode_matrix", "tail_step", "tail_basis", "tail_bias")
        tensors = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **tensors)

    def with_rank(self, rank: int) -> Self:
        """The codec of the first directions: it decodes the same codes, more coarsely."""
        step, basis, matrix = self.tail_step[:rank], self.tail_basis[:, :rank].contiguous(), self.encode_matrix[:, :rank]
        return self if rank == self.rank else replace(self, tail_step=step, tail_basis=basis, encode_matrix=matrix)

    def encode(self, hidden_ND: Tensor, logits_NV: Tensor, labels_N: Tensor) -> tuple[DistributionCodes, Tensor]:
        """Codes of N rows, and how many of the codes hit their limit (int64 scalar).

        `hidden_ND`: what the output head reads. `logits_NV`: float32, soft-capped; overwritten. `labels_N`: int64, -1 where the
        next token is not known. Equal input gives equal codes.
        """
        values_Nk, ids_Nk = top_k(logits_NV, self.head)
        ids_Nk, order_Nk = ids_Nk.sort(dim=1)
        values_Nk = values_Nk.gather(1, order_Nk)
        top_N1 = values_Nk.amax(1, keepdim=True) if self.head else logits_NV.amax(1, keepdim=True)
        distance_Nk = top_N1 - values_Nk
        head_codes = (distance_Nk / self.head_range).sqrt().mul(self.head_levels).round().clamp(0, self.head_levels)
        head_codes = head_codes.to(torch.uint8 if self.head_bits == 8 else torch.int32)
        label_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0] - top_N1[:, 0]
        head_NT, tail_NT, weighted_N = self._masses(logits_NV.sub_(top_N1), ids_Nk, distance_Nk)
        one = self.temperatures.index(1.0)
        total_N = head_NT[:, one] + tail_NT[:, one]
        label_N -= total_N.log()
        entropy_N = total_N.log() - weighted_N / total_N
        single = [-total_N.log(), label_N.masked_fill(labels_N < 0, torch.nan), entropy_N]
        scalars = torch.cat([torch.stack(single, 1), head_NT.log() - tail_NT.log()], 1)
        tail_codes, beyond = self.encode_tail(hidden_ND)
        saturated = beyond + (distance_Nk > self.head_range * 1.01).sum()
        return DistributionCodes(ids_Nk.to(torch.int32), head_codes, tail_codes, scalars.to(torch.float16)), saturated

    def encode_tail(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Tail codes [N, r], and how many of them hit their limit (int64 scalar)."""
        limit = 2 ** (self.tail_bits - 1) - 1
        tail = ((hidden_ND.float() - self.mean) @ self.encode_matrix / self.tail_step).round()
        codes = tail.clamp(-limit, limit).to(torch.int8 if self.tail_bits == 8 else torch.int16)
        return codes, (tail.abs() > limit).sum()

    def _masses(self, below_NV: Tensor, ids_Nk: Tensor, distance_Nk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(head, tail) [N, T] masses relative to the row's maximum, and Σ exp(z) z [N] of the whole row at temperature 1.

        `below_NV` is overwritten. The powers at 2 and 4 are square roots of those at 1: what underflowed there
        weighs less than 1e-9 of the maximum at 4.
        """
        head_NT = torch.stack([(-distance_Nk / t).exp().sum(1) for t in self.temperatures], 1)
        roots = list(takewhile(lambda t: t in self.temperatures, (1.0, 2.0, 4.0)))
        tails = {}
        power_NV = torch.empty_like(below_NV)
        for temperature in (t for t in self.temperatures if t not in roots):
            torch.mul(below_NV, 1 / temperature, out=power_NV).exp_().scatter_(1, ids_Nk, 0)
            tails[temperature] = power_NV.sum(1)
        torch.exp(below_NV, out=power_NV)
        weighted_N = below_NV.mul_(power_NV).sum(1)
        power_NV.scatter_(1, ids_Nk, 0)
        for temperature in roots:
            tails[temperature] = (power_NV if temperature == 1 else power_NV.sqrt_()).sum(1)
        return head_NT, torch.stack([tails[t] for t in self.temperatures], 1), weighted_N

    def mass_column(self, temperature: float) -> int:
        """Column of `scalars` with log(head mass / tail mass) at a temperature; MismatchError if it was not cached."""
        if temperature not in self.temperatures:
            raise MismatchError(
                "the cache cannot serve this temperature", expected=f"one of {list(self.temperatures)}", found=temperature
            )
        return len(SCALARS) + self.temperatures.index(temperature)

    def tail_logits(self, codes: DistributionCodes) -> Tensor:
        """ẑ [N, V] float32: the low-rank logits, soft-capped."""
        integers = _signed(codes.tail_codes[:, : self.rank]).float()
        if integers.device.type == "cpu" and self.tail_bits == 8 and has_bf16_units():
            # int8 is exact in bfloat16, and the basis is in two halves: 16 bits of it, and float32 sums
            with bf16_units():
                logits = torch.addmm(self.tail_bias, torch.cat([integers, integers], 1), self._stepped_halves.T)
        else:
            logits = torch.addmm(self.tail_bias, integers * self.tail_step, self.tail_basis.T)
        return apply_softcap(logits, self.softcap)

    @cached_property
    def _stepped_halves(self) -> Tensor:
        return two_halves(self.tail_basis * self.tail_step)

    def logprobs(self, codes: DistributionCodes, temperature: float, tail_NV: Tensor | None = None) -> Tensor:
        """log p_T [N, V] float32 of the teacher at a cached temperature, in nats.

        `tail_NV`: softened logits of the tail's shape, overwritten at the head's ids. None takes the cached ones,
        `tail_logits(codes) / temperature`. A cache without a tail (rank 0) needs the caller's: a student's own make the tail one
        bucket, of which a divergence sees the mass only.
        """
        if tail_NV is None:
            if not self.rank:
                raise ValueError("a cache without a tail needs the shape of one")
            tail_NV = self.tail_logits(codes).div_(temperature)
        known = self.known(codes, temperature, tail_NV.dtype)
        logprobs_NV = tail_NV.scatter_(1, known.ids, PADDED_LOGIT).log_softmax(1).add_(known.log_tail)
        return logprobs_NV.scatter_(1, known.ids, known.log_head)

    def known(self, codes: DistributionCodes, temperature: float, dtype: torch.dtype = torch.float32) -> "KnownMasses":
        """What the codes say of each row without the tail's shape."""
        log_ratio_N1 = codes.scalars[:, self.mass_column(temperature)].to(dtype)[:, None]
        log_tail_N1, log_head_N1 = (F.logsigmoid(sign * log_ratio_N1).clamp(min=LOG_NOTHING) for sign in (-1, 1))
        distance_Nk = self.head_range * (codes.head_codes.to(dtype) / self.head_levels).square()
        return KnownMasses(codes.head_ids.long(), F.log_softmax(-distance_Nk / temperature, 1) + log_head_N1, log_tail_N1)
