"""How much text calibration reads: a share of the plan, and no more than the fits can use."""

from collections.abc import Sequence
from dataclasses import dataclass

FIT_TOKENS_PER_CHANNEL = (8, 16)
"""Tokens that the bases are fitted on, least and most, for each channel of the teacher's width: held-out KL is flat from 16 on."""
FIT_TOKENS = 2048
"""And least in any case: how far a coordinate reaches shows only in many tokens."""
FIT_SHARE, HELD_OUT_SHARE = 1 / 12, 1 / 24
"""Of the plan's tokens, what calibration takes between its least and its most."""
HELD_OUT_TOKENS = (4, 2048, 4096)
"""The codec is measured on: least, for each channel, but no more than the second; most."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that calibration reads: of each source, and the share of them that the codec is measured on."""

    by_source: tuple[int, ...]
    held_out_share: float


def budget(asked_per_source: int | None, sizes: Sequence[int], width: int, most: int | None = None) -> Budget:
    """Of sources of these sizes. One budget for all, half of it spread evenly, half by their sizes; or what the recipe asks of
    each."""
    total = sum(sizes)
    few, many = (width * tokens for tokens in FIT_TOKENS_PER_CHANNEL)
    fit = max(FIT_TOKENS, min(many, max(few, round(total * FIT_SHARE))))
    least, step, largest = HELD_OUT_TOKENS
    held = min(largest, max(min(step, least * width), round(total * HELD_OUT_SHARE)))
    if asked_per_source is not None:
        own = [min(size, asked_per_source) for size in sizes]
        return Budget(tuple(own), min(1 / 4, largest / max(1, sum(own))))
    wanted = fit + held if most is None else min(most, fit + held)
    even = [min(size, wanted * (1 / len(sizes) + size / max(1, total)) / 2) for size in sizes]
    room = [size - tokens for size, tokens in zip(sizes, even, strict=True)]
    spare = max(0.0, wanted - sum(even)) / max(1.0, sum(room))  # what a small source cannot give, the others do
    shared = [tokens + min(1.0, spare) * more for tokens, more in zip(even, room, strict=True)]
    return Budget(tuple(round(tokens) for tokens in shared), held / (fit + held))


def held_out(lengths: Sequence[int], share: float) -> list[bool]:
    """Which segments the codec is measured on: spread evenly, about this share of the tokens."""
    found, seen, taken = [], 0, 0
    for length in lengths:
        seen += length
        found.append(taken + length / 2 < share * seen)
        taken += length if found[-1] else 0
    return found
