"""What the tokens of two tokenizers spell, in one alphabet, so that their texts can be compared symbol by symbol.

A symbol is a byte of UTF-8, or a mark: what a special token means. Special tokens that are spelled alike are the same mark; so are
the ends of texts, whatever the two tokenizers call them, unless the other has a token of that name. What a tokenizer puts before
a text is no symbol: only one of two may put something there. Strings of symbols are `str`: bytes as the first 256 characters,
marks behind them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from model_taps.loading import vocabulary_size
from signal_store.errors import InputError

FIRST_MARK = 256
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
END = "the end of a text"
"""The name of the mark that both tokenizers' ends of text are."""


def byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies write bytes: the printable ones as themselves, the others from U+0100 on.

    Source: Radford et al. 2019, `bytes_to_unicode` of GPT-2's published encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _decoders(tokenizer: Tokenizer) -> set[str]:
    """Names of the steps by which a tokenizer's tokens become text."""
    found: Any = json.loads(tokenizer.to_str())["decoder"] or {}
    return {step["type"] for step in found.get("decoders", [found]) if "type" in step}


def _text_bytes(tokenizer: PreTrainedTokenizerFast, where: str) -> dict[int, bytes]:
    """By id, the bytes of the tokens that a vocabulary was trained to; InputError for a kind that does not say them."""
    vocabulary, decoders = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False), _decoders(tokenizer.backend_tokenizer)
    if "ByteLevel" in decoders:
        known = byte_of_character()
        return {number: bytes(known[char] for char in token) for token, number in vocabulary.items() if known.keys() >= set(token)}
    if decoders & {"Metaspace", "ByteFallback"}:
        return {number: _sentencepiece_bytes(token) for token, number in vocabulary.items()}
    raise InputError(
        "the tokens of this tokenizer do not say which bytes they are",
        expected="a byte-level or a SentencePiece vocabulary",
        found=", ".join(sorted(decoders)) or "no decoder",
        where=where,
    )


def _sentencepiece_bytes(token: str) -> bytes:
    """`<0x0A>` is a byte, ▁ a space."""
    if BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


@dataclass(frozen=True)
class Spelling:
    """Of one tokenizer. `symbols` by id: what a token spells, "" for an id that has none."""

    tokenizer: PreTrainedTokenizerFast
    symbols: tuple[str, ...]
    marks: dict[str, int]
    """By symbol, the special token that is it."""
    fallback: frozenset[int] = frozenset()
    """Tokens that stand for a byte where there is no other, as `<0x20>` beside ▁."""

    @cached_property
    def token_of(self) -> dict[str, int]:
        """By symbols, the token that spells them: of several, the first that is no fallback."""
        numbers = range(len(self.symbols))
        found: dict[str, int] = {}
        for number in [*(n for n in numbers if n not in self.fallback), *sorted(self.fallback)]:
            if self.symbols[number]:
                found.setdefault(self.symbols[number], number)
        return found

    @cached_property
    def order(self) -> tuple[int, ...]:
        """All ids, sorted by what they spell."""
        return tuple(sorted(range(len(self.symbols)), key=self.symbols.__getitem__))

    @cached_property
    def put_before(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text."""
        special = frozenset(self.tokenizer.all_special_ids)
        return tuple(takewhile(special.__contains__, self.tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids))

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.asarray([len(symbols) for symbols in self.symbols], np.int64)

    def leading(self, ids: NDArray[np.int64]) -> int:
        """How many of the first tokens are what the tokenizer puts before every text."""
        puts = self.put_before
        return len(puts) if tuple(ids[: len(puts)].tolist()) == puts else 0

    def spelled(self, ids: NDArray[np.int64]) -> tuple[str, NDArray[np.int64]]:
        """(the symbols of tokens, int64 [n] where each ends among them); what is put before a text has none."""
        leading = self.leading(ids)
        lengths = self._lengths[ids]
        lengths[:leading] = 0
        return "".join(self.symbols[token] for token in ids[leading:].tolist()), lengths.cumsum()


def runs_of(text: str) -> Iterator[tuple[int, str]]:
    """(first place, symbols) of runs of bytes, and of marks one by one."""
    start = 0
    for place, symbol in enumerate(text):
        if ord(symbol) >= FIRST_MARK:
            if start < place:
                yield start, text[start:place]
            yield place, symbol
            start = place + 1
    if start < len(text):
        yield start, text[start:]


def spellings(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> tuple[Spelling, Spelling]:
    """Of both, their marks paired. InputError for a tokenizer whose tokens do not say their bytes."""
    names = [_mark_names(tokenizer, other) for tokenizer, other in ((teacher, student), (student, teacher))]
    known = sorted({name for own in names for name in own.values()})
    symbol_of = {name: chr(FIRST_MARK + number) for number, name in enumerate(known)}
    first, second = (
        _spelling(tokenizer, {number: symbol_of[name] for number, name in own.items()}, what)
        for tokenizer, own, what in zip((teacher, student), names, ("the teacher's tokenizer", "the student's"), strict=True)
    )
    return first, second


def _mark_names(tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> dict[int, str]:
    """By id of a special token, what it means."""
    mine, theirs = _special(tokenizer), _special(other).values()
    ends = {} if tokenizer.eos_token_id is None or other.eos_token_id is None else {int(tokenizer.eos_token_id): END}
    shared = {str(tokenizer.eos_token), str(other.eos_token)} & {*mine.values()} & {*theirs}
    return {number: f"token {content}" for number, content in mine.items()} | ({} if shared else ends)


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """By id, how special tokens are spelled."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
    found = {number: token.content for number, token in added if token.special}
    return found | ({} if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id): str(tokenizer.eos_token)})


def _spelling(tokenizer: PreTrainedTokenizerFast, marks: dict[int, str], where: str) -> Spelling:
    if not tokenizer.get_vocab():
        raise InputError("the tokenizer has no tokens", where=where)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
    bytes_of = str.encode if "ByteLevel" in _decoders(tokenizer.backend_tokenizer) else _sentencepiece_bytes
    spelled = _text_bytes(tokenizer, where) | {number: bytes_of(token.content) for number, token in added}
    symbols = [""] * vocabulary_size(tokenizer)
    for number, data in spelled.items():
        symbols[number] = data.decode("latin-1")
    for number, symbol in marks.items():
        symbols[number] = symbol
    fallback = frozenset(number for token, number in tokenizer.get_vocab().items() if BYTE_TOKEN.fullmatch(token))
    return Spelling(tokenizer, tuple(symbols), {symbol: number for number, symbol in marks.items()}, fallback)


def same_symbols(first: Sequence[str], second: Sequence[str]) -> int:
    """How many symbols two strings begin with alike."""
    return next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
