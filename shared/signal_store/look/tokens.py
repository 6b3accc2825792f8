"""The text of tokens, from the tokenizer's own files that the cache keeps.

Tokens that are parts of one character (a Chinese one may be three) stand together: the last of them carries it, the others are
empty, so that the pieces of a text, joined, are the text. A tokenizer without a `tokenizer.json` has no text here: a token is #id.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

from tokenizers import Tokenizer

from signal_store.cache import Cache

UNFINISHED = "\ufffd"
"""What a tokenizer decodes part of a character to."""
LONGEST_CHARACTER = 8
"""Tokens: more of them that do not become a character are shown as what they are."""


class TokenTexts:
    """Of one cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        data = self._cache.tokenizer_files().get("tokenizer.json")
        return None if data is None else Tokenizer.from_str(data.decode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones too."""
        if self._tokenizer is None:
            return "".join(f"#{number}" for number in ids)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def groups(self, ids: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        """(first, one after the last, text) of tokens that stand together, in order."""
        first = 0
        for place in range(len(ids)):
            text = self._after(ids[first - 1 : first], ids[first : place + 1])
            if text.endswith(UNFINISHED) and place + 1 - first < LONGEST_CHARACTER and place + 1 < len(ids):
                continue
            yield first, place + 1, text
            first = place + 1

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text a token; joined, they are the text."""
        return [piece for first, stop, text in self.groups(ids) for piece in [*[""] * (stop - first - 1), text]]

    def _after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Decoded behind the token before: some tokenizers drop the space at the beginning of a text."""
        known, both = self.decode(before), self.decode([*before, *ids])
        return both[len(known) :] if before and both.startswith(known) else self.decode(ids)

    @lru_cache(maxsize=65_536)  # noqa: B019  (lives as long as the cache it is of)
    def piece(self, number: int) -> str:
        """Of one token by itself; part of a character is shown as the vocabulary spells it."""
        if self._tokenizer is None:
            return f"#{number}"
        text, spelled = self.decode([number]), self._tokenizer.id_to_token(number) or f"#{number}"
        if UNFINISHED in text or not text:
            return spelled
        return f" {text}" if spelled.startswith("▁") and not text.startswith(" ") else text


@lru_cache(maxsize=8)
def token_texts(cache: Cache) -> TokenTexts:
    """Of a cache, its tokenizer read once."""
    return TokenTexts(cache)
