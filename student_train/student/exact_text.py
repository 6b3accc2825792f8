"""Text of tokens that is the cache's, byte for byte, or none: cut between characters, never inside one.

A byte-level token may be part of a character, and a tokenizer's own tokens (what it puts before a text, the end-of-text token) are
no text at all. `begin` cuts a segment's beginning at the nearest places where its tokens spell whole characters of the document;
`written` says what a student wrote behind it. Tokens are exact if they take as many bytes of the document as their text has, or if
their text becomes the same tokens again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from transformers import PreTrainedTokenizerFast

from signal_view.tokens import UNFINISHED, TokenTexts


@dataclass(frozen=True, slots=True)
class Beginning:
    """`ids` that a student goes on from, the first `own` of them the tokenizer's; `text` of the others; `shifted`: the cut that was
    asked for lay inside a character."""

    ids: list[int]
    own: int
    text: str
    shifted: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens [first, stop) that become characters together, and their text."""

    first: int
    stop: int
    text: str


@dataclass(frozen=True)
class ExactText:
    """Of one tokenizer."""

    tokenizer: PreTrainedTokenizerFast

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer.backend_tokenizer)

    @cached_property
    def _put_before(self) -> list[int]:
        """What the tokenizer puts before every text."""
        puts = self.tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
        return list(takewhile(self._special.__contains__, puts))

    def has_marks(self, ids: Sequence[int]) -> bool:
        """Whether special tokens are among these, behind what the tokenizer puts before every text."""
        return any(token in self._special for token in ids[self._own(ids) :])

    def spells_special(self, text: str) -> bool:
        """Whether a text spells a special token."""
        return any(token in text for token in self.tokenizer.all_special_tokens)

    def begin(self, ids: Sequence[int], byte_end: Sequence[int], length: int, room: int) -> Beginning | None:
        """Of a segment (`ids`, and `byte_end` as `tokens/byte_end`) the first `length` tokens, or the last `room` of those; None
        where they hold no character that can be had exactly."""
        own = self._own(ids)
        stop = next((n for n in range(own + 1, len(ids)) if self._is_mark(ids, byte_end, n)), len(ids))
        wanted = min(max(length, own), stop)
        first_wanted = max(own, wanted - max(1, room - own))
        kept: list[_Piece] = []
        for piece in reversed([p for p in self._pieces(ids[own:stop], own) if first_wanted <= p.first and p.stop <= wanted]):
            before = 0 if piece.first == own else byte_end[piece.first - 1]
            if self._is_exact(ids, piece, int(byte_end[piece.stop - 1]) - int(before)):
                kept.insert(0, piece)
            elif kept:
                break
        if not kept:
            return None
        first, last = kept[0].first, kept[-1].stop
        text = "".join(piece.text for piece in kept)
        return Beginning([*ids[:own], *ids[first:last]], own, text, (first, last) != (first_wanted, wanted))

    def of_text(self, text: str, shifted: bool) -> Beginning | None:
        """A text in this tokenizer's tokens, behind what it puts before every text; None where these do not spell it."""
        ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        spelled = self._texts.decode(ids)
        if spelled not in (text, f" {text}"):  # SentencePiece puts a space before a text
            return None
        return Beginning([*self._put_before, *ids], len(self._put_before), text, shifted)

    def written(self, beginning: Beginning, ids: Sequence[int]) -> tuple[str, bool]:
        """(the text of `ids` behind a beginning, up to the first place that is no character; whether that cut something off)."""
        prompt = beginning.ids[beginning.own :]
        whole = [*prompt, *ids]
        text = ""
        for piece in self._pieces(whole, 0):
            if piece.stop <= len(prompt):
                continue
            if piece.first < len(prompt) or (UNFINISHED in piece.text and not self._becomes(whole, piece)):
                return text, True
            text += piece.text
        return text, False

    def _own(self, ids: Sequence[int]) -> int:
        """How many of the first tokens the tokenizer puts before every text."""
        puts = self._put_before
        return len(puts) if list(ids[: len(puts)]) == puts else 0

    def _is_mark(self, ids: Sequence[int], byte_end: Sequence[int], place: int) -> bool:
        """Whether a token is a special one that takes no byte of the document, such as the end-of-text token that closes it."""
        return ids[place] in self._special and byte_end[place] == byte_end[place - 1]

    def _pieces(self, ids: Sequence[int], start: int) -> list[_Piece]:
        """A token without text, such as a space that a tokenizer puts before every text, belongs to the next piece."""
        found: list[_Piece] = []
        begun = start
        for _, stop, text in self._texts.groups(list(ids)):
            if text:
                found.append(_Piece(begun, start + stop, text))
                begun = start + stop
        return found

    def _is_exact(self, ids: Sequence[int], piece: _Piece, taken_bytes: int) -> bool:
        whole = UNFINISHED not in piece.text and len(piece.text.encode()) == taken_bytes
        spelled = any(token in self._special for token in ids[piece.first : piece.stop])
        return whole or (not spelled and self._becomes(ids, piece))

    def _becomes(self, ids: Sequence[int], piece: _Piece) -> bool:
        """Whether the piece's text becomes its tokens again, behind what a tokenizer may put before every text."""
        again = self.tokenizer.backend_tokenizer.encode(piece.text, add_special_tokens=False).ids
        more = len(again) - (piece.stop - piece.first)
        if more < 0 or again[more:] != list(ids[piece.first : piece.stop]):
            return False
        return not self._texts.decode(again[:more])
