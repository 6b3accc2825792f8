"""Which codec of the distribution a cache gets: the fewest bytes, over head size and quantisation step together, within the
recipe's bounds.

A pilot measures every head at a few steps on some hundred tokens; between them KL and angle are powers of the step. The bytes of
head and tail are those of their codes, compressed as fill compresses them. The best head's step is then measured on all held-out
tokens and moved until it meets both bounds, closely. A codec is never taken on the pilot's word. Legend: n held-out tokens, D
width.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import DistributionCodec, DistributionCodes
from signal_store.codecs.zigzag import to_zigzag
from signal_store.errors import InputError
from signal_store.io.shard_writer import encode_chunk
from signal_store.signals import DistributionSignal
from signal_store.signals.distribution import distribution_arrays
from teacher_cache.signals.tail.basis import TailFit, logit_chunks
from teacher_cache.signals.tail.fidelity import Fidelity, measure

PILOT_TOKENS = 512
PILOT_FACTORS = (2.0, 1.0, 0.5)
"""Steps of the pilot, of a first guess, coarse to fine."""
ENOUGH = 2
"""Steps within the bounds, after which the coarser one is taken though it be not close."""
CLOSE = 0.85
"""A step is close enough where its worst figure is at least this share of its bound."""
FINEST = 2**-12
AIM = 0.95
"""Where within the bounds a step is aimed at, so that one more measurement is seldom needed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The codec, what was measured of it on all held-out tokens, and its bytes per token as those tokens' codes compress."""

    codec: DistributionCodec
    fidelity: Fidelity
    bytes_per_token: float
    tokens: int


def choose_codec(fit: TailFit, head: OutputHead, signal: DistributionSignal, held_out_nD: Tensor) -> Choice:
    """The codec of the recipe's rank; for `auto` the one of fewest bytes within both bounds, InputError if there is none."""
    if signal.rank != "auto":
        codec = fit.codec_of_rank(min(signal.rank, len(fit.mean)), signal, head.softcap)
        return _chosen(codec, measure([codec], head, held_out_nD)[0], signal, head, held_out_nD)
    for option in _pilot(fit, head, signal, held_out_nD):
        found, fidelity = _search(option, fit, head, held_out_nD)
        if found is not None:
            return _chosen(found, fidelity, option.signal, head, held_out_nD)
    raise _no_codec(signal, fidelity)


def _search(option: "_Option", fit: TailFit, head: OutputHead, held_out_nD: Tensor) -> tuple[DistributionCodec | None, Fidelity]:
    """The codec of the coarsest step found within the bounds, and its fidelity; None, and the fidelity of the finest step, if
    none is."""
    coarsest, step = _coarsest(fit), option.step
    within: list[tuple[float, DistributionCodec, Fidelity]] = []
    beyond: list[float] = []
    while True:
        step = min(max(step, coarsest * FINEST), coarsest)
        codec = fit.codec_of_step(step, option.signal, head.softcap)
        (fidelity,) = measure([codec], head, held_out_nD)
        excess = fidelity.excess(*option.signal.bounds)
        following = step * min((AIM / found) ** (1 / slope) for found, slope in zip(excess, option.slopes, strict=True))
        if max(excess) <= 1:
            within.append((step, codec, fidelity))
            if max(excess) >= CLOSE or step == coarsest or beyond or len(within) == ENOUGH:
                break
        else:
            if within:
                break
            if step == coarsest * FINEST:
                return None, fidelity
            beyond.append(step)
            if len(beyond) > 1:  # what does not shrink with the step is no power of it
                following = min(following, step / 4)
        step = following
    _, codec, fidelity = max(within, key=lambda found: found[0])
    return codec, fidelity


def _no_codec(signal: DistributionSignal, fidelity: Fidelity) -> InputError:
    kl, angle = signal.bounds
    return InputError(
        "no rank meets the bounds of signals.distribution",
        expected=f"T²·KL of {kl} nats, an angle of {angle} degrees",
        found=f"{max(fidelity.scaled_kl_nats):.2g} and {max(fidelity.angle_degrees):.2g} at the finest step",
        remedy="Set tail_bits: 16 or a larger head, loosen the bounds, or give a rank.",
    )


def _chosen(codec: DistributionCodec, fidelity: Fidelity, signal: DistributionSignal, head: OutputHead, rows_nD: Tensor) -> Choice:
    some_nD = rows_nD[:: max(1, len(rows_nD) // PILOT_TOKENS)]
    size = stored_bytes(encode_rows(codec, head, some_nD), codec, signal, ("scalars", "head"))
    size += stored_bytes(tail_codes(codec, rows_nD), codec, signal, ("tail",))
    return Choice(codec, fidelity, size, len(rows_nD))


def _coarsest(fit: TailFit) -> float:
    return float(fit.energy[0].sqrt()) * 2


@dataclass(frozen=True, slots=True)
class _Option:
    """A head size: the signal with it, the step to begin with, and the powers of the step that KL and angle are there; predicted
    bytes of head and tail."""

    signal: DistributionSignal
    step: float
    slopes: tuple[float, float]
    stored_bytes: float


def _pilot(fit: TailFit, head: OutputHead, signal: DistributionSignal, held_out_nD: Tensor) -> list[_Option]:
    """Every head size, fewest bytes first."""
    rows_nD = held_out_nD[:: max(1, len(held_out_nD) // PILOT_TOKENS)][:PILOT_TOKENS]
    guess = step_of_error(fit, signal.bounds[0])
    steps = [guess * factor for factor in PILOT_FACTORS]
    signals = [signal.model_copy(update={"head": size}) for size in signal.head_sizes(len(head.weight))]
    codecs = [fit.codec_of_step(step, own, head.softcap) for own in signals for step in steps]
    excesses = [found.excess(*signal.bounds) for found in measure(codecs, head, rows_nD)]
    options = []
    for number, own in enumerate(signals):
        step, slopes = interpolate(steps, excesses[number * len(steps) : (number + 1) * len(steps)])
        codec = fit.codec_of_step(step, own, head.softcap)
        stored = stored_bytes(tail_codes(codec, held_out_nD), codec, own, ("tail",))
        if len(signals) > 1:
            stored += stored_bytes(encode_rows(codec, head, rows_nD), codec, own, ("head",))
        options.append(_Option(own, step, slopes, stored))
    return sorted(options, key=lambda option: option.stored_bytes)


def step_of_error(fit: TailFit, half_squared_error: float) -> float:
    """The step that makes half this squared error of the logits: KL's second order at T²·KL, if all of the mass were tail."""
    low, high = _coarsest(fit) * FINEST, _coarsest(fit)
    for _ in range(30):
        middle = math.sqrt(low * high)
        error = float(torch.minimum(fit.energy, torch.tensor(middle**2 / 12, dtype=torch.float64)).sum())
        low, high = (middle, high) if error < 2 * half_squared_error else (low, middle)
    return low


def interpolate(steps: list[float], excesses: list[tuple[float, float]]) -> tuple[float, tuple[float, float]]:
    """The coarsest step whose two figures stay below AIM, each a power of the step between its two nearest measurements; and those
    powers. Steps fall."""
    wanted, slopes = [], []
    for figures in zip(*excesses, strict=True):
        pairs = list(pairwise(zip(steps, figures, strict=True)))
        (s0, f0), (s1, f1) = next((pair for pair in pairs if pair[1][1] <= AIM), pairs[-1])
        slope = min(4.0, max(0.5, math.log(max(f0, 1e-12) / max(f1, 1e-12)) / math.log(s0 / s1)))
        slopes.append(slope)
        wanted.append(s1 * min(8.0, max(1 / 8, (AIM / max(f1, 1e-12)) ** (1 / slope))))
    return min(wanted), (slopes[0], slopes[1])


@torch.inference_mode()
def encode_rows(codec: DistributionCodec, head: OutputHead, rows_nD: Tensor) -> DistributionCodes:
    """The codes of some tokens, without labels, on the CPU."""
    own = codec.to(head.weight.device)
    unknown = torch.full((len(rows_nD),), -1, device=head.weight.device)
    parts = [own.encode(chunk, head.logits(chunk), unknown[: len(chunk)])[0].to("cpu") for chunk in logit_chunks(rows_nD, head)]
    return DistributionCodes(*(torch.cat([getattr(part, name) for part in parts]) for name in DistributionCodes.__slots__))


def tail_codes(codec: DistributionCodec, rows_nD: Tensor) -> DistributionCodes:
    """The codes of the tail alone."""
    nothing = torch.zeros(len(rows_nD), 0)
    return DistributionCodes(nothing, nothing, codec.to("cpu").encode_tail(rows_nD.float())[0], nothing)


def stored_bytes(codes: DistributionCodes, codec: DistributionCodec, signal: DistributionSignal, arrays: tuple[str, ...]) -> float:
    """Bytes of a token in the arrays whose names begin so, compressed in one chunk as fill compresses them."""
    own = signal.model_copy(update={"head": codec.head, "samples": 0})
    total = 0
    for spec in distribution_arrays(own, codec.rank, 2**16, codec.vocab_size):
        name = spec.path.split("/")[1]
        if name.startswith(arrays):
            rows = getattr(codes, name).numpy()
            rows = to_zigzag(rows) if name == "tail_codes" and spec.dtype == "uint8" else rows.astype(spec.dtype, copy=False)
            total += len(encode_chunk(rows, spec)[0])
    return total / len(codes)
