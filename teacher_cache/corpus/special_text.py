"""Special tokens that a text spells. They stay text: who writes `<|end|>` in a file or a turn ends nothing and forges no turn.

Special are the tokenizer's special tokens, and those of its added tokens that have the form of a mark, as `<｜User｜>`, which some
families add without calling it special. Tags like `<think>` or `</tool_call>`, where they are not special, are what models write in
answers, and remain tokens.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError

MARK = re.compile(r"<[|｜].*>|<.*[|｜]>|\[/?[A-Z_]+\]")
MARKERS = range(0x10FFFF, 0xEFFFF, -1)
"""Noncharacters and private use, the last two planes. The first that a text does not hold stands before each special token that is
one, in a text that spells others."""
MOST_READERS = 4
"""Tokenizers that are kept, one a marker. The first marker does for nearly all texts."""
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, uint32 [n]; `spans` int64 [n, 2], its characters, white space too; the tokenizer put the first `leading`
    and the last `trailing` of them around it."""

    input_ids: NDArray[np.uint32]
    spans: NDArray[np.int64]
    leading: int
    trailing: int


class SpecialText:
    """Which strings are special to a tokenizer, and how to read a text in which some of them are not."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._held = frozenset("".join(token.content for token in added.values()))
        self._ids = {
            token.content: number
            for number, token in added.items()
            if token.content.strip() and (token.special or MARK.fullmatch(token.content))
        }
        longest = sorted(self._ids, key=lambda token: (-len(token), token))
        self.pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._guarded = functools.lru_cache(MOST_READERS)(self._guard)

    def spelled(self, text: str) -> tuple[Span, ...]:
        """Where a text that brings no special tokens spells some."""
        return tuple(match.span() for match in self.pattern.finditer(text))

    def marker(self, text: str) -> str:
        """A character that the text does not hold, nor any added token. InputError for a text that holds all there are for it."""
        held = self._held.union(text)
        found = next((char for char in map(chr, MARKERS) if char not in held), None)
        if found is None:
            raise InputError(
                "a text that spells special tokens leaves no character to mark others with",
                expected="one of U+F0000 to U+10FFFF that it does not hold",
                found="all of them",
                remedy="Give the source special_tokens: tokens, or leave such texts out.",
            )
        return found

    def encode(self, texts: Sequence[str], spelled: Sequence[Sequence[Span]], *, add_special_tokens: bool) -> list[Encoded]:
        """The tokens of each text, of which those in `spelled` spans are no special ones."""
        found: dict[int, Encoded] = {}
        groups: dict[str, list[int]] = defaultdict(list)
        for number, spans in enumerate(spelled):
            groups[self.marker(texts[number]) if spans else ""].append(number)
        for marker, numbers in groups.items():
            reader = self._guarded(marker) if marker else self._untrimmed
            wanted = [self._marked(texts[number], spelled[number], marker) if marker else texts[number] for number in numbers]
            encodings = reader.encode_batch(wanted, add_special_tokens=add_special_tokens)
            found |= {n: _encoded(text, e, marker) for n, text, e in zip(numbers, wanted, encodings, strict=True)}
        return [found[number] for number in range(len(texts))]

    def _marked(self, text: str, spelled: Sequence[Span], marker: str) -> str:
        """The text with the marker before each special token that is one."""
        parts: list[str] = []
        for (_, start), (stop, end) in pairwise([(0, 0), *spelled, (len(text), len(text))]):
            parts += [self.pattern.sub(lambda match: marker + match[0], text[start:stop]), text[stop:end]]
        return "".join(parts)

    @cached_property
    def _untrimmed(self) -> Tokenizer:
        """The tokenizer, its offsets with the white space that is in the tokens."""
        content = json.loads(self._backend.to_str())
        untrimmed = _untrim(content)
        return self._backend if untrimmed == content else Tokenizer.from_str(json.dumps(untrimmed, ensure_ascii=False))

    def _guard(self, marker: str) -> Tokenizer:
        """A tokenizer that knows the special tokens only with the marker before them, under their old ids."""
        content = _untrim(json.loads(self._backend.to_str()))
        names = {token: marker + token for token in self._ids}
        for token in content["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        model = content["model"]
        model["vocab"] = _renamed(model.get("vocab"), names)
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not names.keys() & _made_of(pair)]
        try:
            found = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
        except Exception as error:  # the library raises bare Exception
            raise self._cannot(str(error)) from error
        if moved := [token for token, number in self._ids.items() if found.token_to_id(names[token]) != number]:
            raise self._cannot(", ".join(moved[:5]))
        return found

    def _cannot(self, reason: str) -> InputError:
        return InputError(
            "a text spells special tokens, and this tokenizer cannot be made to read them as text",
            found=reason,
            remedy="Give the source special_tokens: tokens, or take them out of its texts.",
        )


def _renamed(vocab: Any, names: Mapping[str, str]) -> Any:
    if isinstance(vocab, dict):
        return {names.get(token, token): number for token, number in vocab.items()}
    return [[names.get(token, token), score] for token, score in vocab]


def _encoded(text: str, encoding: Encoding, marker: str) -> Encoded:
    spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    if marker:  # offsets as they are without the marks
        marks = np.asarray([place for place, char in enumerate(text) if char == marker], dtype=np.int64)
        spans = spans - np.searchsorted(marks, spans, side="left")
    around = np.asarray([*encoding.special_tokens_mask, 0], dtype=bool)
    leading = int(around.argmin())
    trailing = int(around[leading:-1][::-1].cumprod().sum())
    return Encoded(np.asarray(encoding.ids, dtype=np.uint32), spans, leading, trailing)


def _made_of(pair: Any) -> set[str]:
    """The two parts of a merge, and what they make."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return {first, second, first + second}


def _untrim(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "post_processor": _untrimmed(content.get("post_processor"))}


def _untrimmed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: False if key == "trim_offsets" else _untrimmed(item) for key, item in value.items()}
    return [_untrimmed(item) for item in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=4)
def special_text(tokenizer: PreTrainedTokenizerFast) -> SpecialText:
    """What is special to a tokenizer, made once."""
    return SpecialText(tokenizer)
