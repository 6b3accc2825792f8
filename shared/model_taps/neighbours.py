"""Whether a segment's states are its own: they must not depend on what else is in the forward pass, nor on its size.

A segment that is run alone is what counts. The probe runs segments of up to the length that will be used alone and together, and
compares. What can come between: attention or recurrent state that crosses segments of a row, positions that do not restart, filler
that is seen, experts of limited room, and rotary frequencies chosen by the longest position of a batch (LongRoPE), for which
segments on either side of that length must not share a pass. What nothing helps is refused.

Two passes of one shape, with other neighbours, must give a segment the same numbers almost exactly; a pass together and one alone
differ by rounding. Cost: the forward passes of some eight segments of full length, none larger than `most_tokens`; more only where
a length makes a difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.blocks import model_body
from model_taps.evaluating import evaluating
from model_taps.head import accepts, final_hidden
from model_taps.packing import Forward, position_ids
from signal_store.errors import InputError, SignalStoreError, memory_error

MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
BRIEF = 9
"""Tokens of the short segment, and of a segment's beginning that is looked at by itself."""
SAME_SHAPE = 0.01
"""Of the difference that rounding may make, what it may between passes of one shape."""
NOISE_FACTOR, MOST_NOISE = 3.0, 0.2
"""A difference is rounding if it is at most so many times what rounding alone does, and no more than this: near ties of a router
make that large."""


@dataclass(frozen=True, slots=True)
class Composition:
    """How segments may share a forward pass. `split_length`: those of at most so many tokens and longer ones may not; None: all
    may."""

    forward: Forward
    split_length: int | None = None


def relative_difference(found_SD: Tensor, expected_SD: Tensor) -> float:
    """Mean over tokens of ‖found − expected‖ / ‖expected‖: of all tokens, the first or the last few, whichever is largest."""
    expected = expected_SD.float()
    error_S = (found_SD.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    parts = [error_S.mean(), error_S[:BRIEF].mean(), error_S[-BRIEF:].mean()]
    return float(torch.stack(parts).nan_to_num(torch.inf).max())


def tolerance(model: PreTrainedModel) -> float:
    """The relative difference that rounding may make, by the dtype that the model computes in."""
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return MAX_RELATIVE_ERROR.get(dtype, 5e-2)


def probe(
    model: PreTrainedModel,
    vocab_size: int,
    length: int,
    *,
    what: str,
    width: int | None = None,
    most_tokens: int | None = None,
    allowed: Sequence[Forward] = ("packed", "padded", "alone"),
) -> Composition:
    """The first of the `allowed` ways that keeps segments of up to `length` tokens apart, in rows of `width` (None: `length`) and
    passes of at most `most_tokens` (None: two rows). InputError where none does."""
    width = width or length
    try:
        with evaluating(model), torch.no_grad():
            return _Probe(model, vocab_size, length, width, most_tokens or 2 * width, what).found(allowed)
    except SignalStoreError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if memory_error(error) is not None:
            raise
        found = f"{type(error).__name__}: {str(error)[:300]}"
        raise InputError(f"the {what} cannot run {length} tokens", found=found, where=model.config.model_type) from error


Segments = list[tuple[int, int]]
"""Of a row: number of a text and how many of its tokens, end to end."""


@dataclass(frozen=True)
class _Probe:
    """Segments are beginnings of the rows of `text`; the same rows of `other` hold other tokens."""

    model: PreTrainedModel
    vocab_size: int
    length: int
    width: int
    most_tokens: int
    what: str

    def found(self, allowed: Sequence[Forward]) -> Composition:
        sides, split = self._sides()
        for forward in allowed:
            if forward == "alone":
                self._refuse_look_ahead(self.alone(0, self.length))
                return Composition("alone")
            ranges = [(self.brief, self.length)] if split is None else [(self.brief, split), (split + 1, self.length)]
            keeps_apart = self._packs if forward == "packed" else self._pads
            if sides and all(keeps_apart(*part) for part in ranges):
                return Composition(forward, split)
        self._refuse_look_ahead(self.alone(0, self.length))
        wanted = " or ".join(allowed)
        raise InputError(
            f"this {self.what} lets segments that share a forward pass change each other",
            expected=f"the same states as alone ({wanted})",
            found=f"others, at segments of up to {self.length} tokens",
            where=self.model.config.model_type,
            remedy="A teacher can run each segment by itself: forward: alone." if self.what == "teacher" else None,
        )

    @property
    def brief(self) -> int:
        return max(1, min(BRIEF, self.length // 2))

    @cached_property
    def has_positions(self) -> bool:
        return accepts(model_body(self.model), "position_ids")

    @cached_property
    def text(self) -> Tensor:
        """int64 [3, length]."""
        return torch.randint(self.vocab_size, (3, self.length), generator=torch.Generator().manual_seed(0))

    @cached_property
    def other(self) -> Tensor:
        return (self.text + 1) % self.vocab_size

    def alone(self, number: int, tokens: int) -> Tensor:
        """States [tokens, d] of the first tokens of a segment, by themselves."""
        return self._run(self.text[number : number + 1, :tokens])[0]

    def _run(self, ids_BS: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        device = next(self.model.parameters()).device
        return final_hidden(self.model, ids_BS.to(device), None if positions_BS is None else positions_BS.to(device))

    def _together(self, rows: list[Segments], width: int, *, restart: bool, kept: tuple[int, int] | None = None) -> Tensor:
        """States [B, width, d] of a pass; `kept` (text, tokens): all else is other tokens, filler too."""
        ids = torch.full((len(rows), width), 0 if kept is None else self.vocab_size // 2)
        for b, row in enumerate(rows):
            column = 0
            for number, tokens in row:
                part = self.text[number, :tokens] if kept is None else self.other[number, :tokens].clone()
                if kept is not None and number == kept[0]:
                    part[: kept[1]] = self.text[number, : kept[1]]
                ids[b, column : column + tokens] = part
                column += tokens
        return self._run(ids, torch.stack([position_ids([n for _, n in row], width) for row in rows]) if restart else None)

    @cached_property
    def noise(self) -> float:
        """What another shape of the same computation makes of a segment: it beside itself."""
        tokens = max(1, min(self.length, self.most_tokens // 2))
        return relative_difference(self._run(self.text[:1, :tokens].expand(2, -1))[0], self.alone(0, tokens))

    def _same(self, found_SD: Tensor, expected_SD: Tensor, *, exactly: bool = False) -> bool:
        """`exactly`: both came from passes of one shape, so that they hardly differ by rounding."""
        difference = relative_difference(found_SD, expected_SD)
        bound = tolerance(self.model) * (SAME_SHAPE if exactly else 1)
        return difference <= bound or difference <= min(NOISE_FACTOR * self.noise, MOST_NOISE)

    def _refuse_look_ahead(self, whole: Tensor) -> None:
        half = self.length // 2
        changed = self._together([[(0, self.length)]], self.length, restart=False, kept=(0, half))[0]
        if half and not self._same(changed[:half], whole[:half], exactly=True):
            raise InputError(
                f"the {self.what} looks ahead: later tokens change earlier states",
                expected="a causal language model",
                found=f"a change, at {self.length} tokens",
                where=self.model.config.model_type,
            )

    def _sides(self) -> tuple[bool, int | None]:
        """(True, None) where lengths change nothing; (True, n) where states are of two kinds, those of passes whose longest segment
        has up to n tokens, and others; (False, None) where each length has its own. InputError where the past matters."""
        half = max(1, self.length // 2)
        before = self.alone(1, half)
        if not self.has_positions:
            same = self._same(self.alone(1, self.length)[:half], before)
            self._refuse_memory(lambda: self.alone(1, half), before, half)
            return same, None
        low, high = self.brief, self.length
        known, longest = self._beside(low), self._beside(high)
        if self._same(longest, known, exactly=True):
            self._refuse_memory(lambda: self._beside(low), known, low)
            return True, None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._same(self._beside(middle), known, exactly=True) else (low, middle)
        self._beside(self.brief)
        longer = self._beside(high)
        self._beside(self.length)
        self._refuse_memory(lambda: self._beside(high), longer, low)
        self._refuse_memory(lambda: self._beside(low), known, low)
        same = self._same(longer, longest, exactly=True)
        return same, low if same else None

    def _beside(self, tokens: int) -> Tensor:
        """States of a brief segment, followed by one of so many tokens and by brief ones: always the same shape."""
        width = self.length + self.brief
        rest = width - self.brief - tokens
        row = [(0, self.brief), (1, tokens), *[(2, self.brief)] * (rest // self.brief)]
        return self._together([row], width, restart=True)[0, : self.brief]

    def _refuse_memory(self, again: Callable[[], Tensor], before: Tensor, most: int) -> None:
        if not self._same(again(), before, exactly=True):
            raise InputError(
                f"the {self.what}'s states depend on what it ran before",
                expected="the same for the same segment",
                found=f"others, after a segment of {self.length} tokens",
                where=self.model.config.model_type,
                remedy=f"Up to some {most} tokens they do not: lower context.",
            )

    def _packs(self, least: int, most: int) -> bool:
        """Of segments of between `least` and `most` tokens, several in a row, beside another row where there is room."""
        if not self.has_positions:
            return False
        second = min(most, self.width - least)
        rows: list[Segments] = [[(0, least), (1, second)] if second >= least else [(1, most)]]
        rows += [[(2, most)]] if self.most_tokens >= 2 * self.width else []
        return self._keeps_apart(rows, self.width, restart=True)

    def _pads(self, least: int, most: int) -> bool:
        """Of segments of between `least` and `most` tokens, one in a row."""
        longest = min(most, max(least, self.most_tokens // 2))
        rows: list[Segments] = [[(1, least)], [(2, longest)]] if self.most_tokens >= 2 * longest else [[(1, longest)]]
        return self._keeps_apart(rows, longest, restart=False)

    def _keeps_apart(self, rows: list[Segments], width: int, *, restart: bool) -> bool:
        """Whether the last segment of the first row is what it is alone, and its first half is that whatever else is there."""
        column = sum(tokens for _, tokens in rows[0][:-1])
        number, tokens = rows[0][-1]
        half = max(1, tokens // 2)
        first = self._together(rows, width, restart=restart)[0, column : column + tokens]
        changed = self._together(rows, width, restart=restart, kept=(number, half))[0, column : column + half]
        return self._same(changed, first[:half], exactly=True) and self._same(first, self.alone(number, tokens))
