"""The text of tokens, from the tokenizer's own files that the cache keeps.

Tokens that are parts of one character (a Chinese one may be three) stand together: the last of them carries it, the others are
empty, so that the pieces of a text, joined, are the text. A tokenizer without a `tokenizer.json` has no text here: a token is #id.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from signal_store.cache import Cache
from signal_view.remembered import once_per_cache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNFINISHED = "\ufffd"
"""What a tokenizer decodes part of a character to."""
LONGEST_CHARACTER = 8
"""Tokens: more of them that do not become a character are shown as what they are."""


class TokenTexts:
    """Of one tokenizer; None where there is none."""

    def __init__(self, tokenizer: "Tokenizer | None") -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones too."""
        if self._tokenizer is None:
            return "".join(f"#{number}" for number in ids)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def groups(self, ids: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        """(first, one after the last, text) of tokens that stand together, in order. Each is decoded behind the group before it:
        some tokenizers drop the space at the beginning of a text, and some decode bytes in runs."""
        before, first = 0, 0
        for place in range(len(ids)):
            text = self._after(ids[before:first], ids[first : place + 1])
            if text.endswith(UNFINISHED) and place + 1 - first < LONGEST_CHARACTER and place + 1 < len(ids):
                continue
            yield first, place + 1, text
            before, first = first, place + 1

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text a token; joined, they are the text."""
        return [piece for first, stop, text in self.groups(ids) for piece in [*[""] * (stop - first - 1), text]]

    def _after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        known, both = self.decode(before), self.decode([*before, *ids])
        return both[len(known) :] if before and both.startswith(known) else self.decode(ids)

    def piece(self, number: int) -> str:
        """Of one token by itself; part of a character is shown as the vocabulary spells it."""
        if number not in self._pieces:
            self._pieces[number] = self._piece(number)
        return self._pieces[number]

    def _piece(self, number: int) -> str:
        if self._tokenizer is None:
            return f"#{number}"
        text, spelled = self.decode([number]), self._tokenizer.id_to_token(number) or f"#{number}"
        if UNFINISHED in text or not text:
            return spelled
        return f" {text}" if spelled.startswith("▁") and not text.startswith(" ") else text


@once_per_cache
def token_texts(cache: Cache) -> TokenTexts:
    """Of a cache, its tokenizer read once."""
    from tokenizers import Tokenizer

    data = cache.tokenizer_files().get("tokenizer.json")
    return TokenTexts(None if data is None else Tokenizer.from_str(data.decode()))
