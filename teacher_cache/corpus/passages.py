"""What of a prompt its answer may rest on: the sentences of a question, the key words of a text to sum up.

Sentences end with . ! ? and their Chinese forms, or with a line; of code, a line is one. Key words are nouns and names, of code
identifiers; a word is told by its first token, and stands once.
"""

import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from signal_store.format.roles import CODE, LEVELS, POS
from signal_store.signals import MOST_COVERAGE_WORDS
from teacher_cache.corpus.document import Document

SENTENCE = re.compile(r"(?:[^.!?。！？\n]|[.!?](?!\s|$))*(?:[.!?。！？\n]|$)")
LINE = re.compile(r"[^\n]*\n?")
KEY_POS = tuple(POS.index(name) for name in ("entity_noun", "noun"))
KEY_CODE = tuple(CODE.index(name) for name in ("definition", "identifier"))


def sentences(document: Document, spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n, 2]: first token and the one after the last of each sentence of the prompt that says something. `spans`
    [tokens, 2] in characters."""
    prompt = document.text[: document.prompt_end]
    pattern = SENTENCE if document.lexer is None else LINE
    ends = [m.end() for m in pattern.finditer(prompt) if m.end() > m.start()]
    begins = [0, *ends][:-1]
    wanted = [(a, b) for a, b in zip(begins, ends, strict=True) if any(c.isalnum() for c in prompt[a:b])]
    token_ends = np.maximum.accumulate(spans[:, 1]) if len(spans) else spans[:, 0]
    last = int(np.searchsorted(token_ends, document.prompt_end, side="right"))  # tokens that reach into the answer are none's
    found = [np.searchsorted(token_ends, edges, side="right") for edges in wanted]
    pairs = [(int(a), min(int(b), last)) for a, b in found if a < min(b, last)]
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def key_words(
    input_ids: NDArray[np.uint32], roles: NDArray[np.uint8], begins_word: NDArray[np.bool_], prompt: int
) -> NDArray[np.int64]:
    """int64 [n, 2]: place and id of the first token of each key word among the first `prompt` tokens, the most frequent first, then
    the earliest."""
    pos, code = (roles[:prompt, list(LEVELS).index(level)] for level in ("pos", "code"))
    key = begins_word[:prompt] & (np.isin(pos, KEY_POS) | np.isin(code, KEY_CODE))
    places = np.flatnonzero(key)
    ids = input_ids[places].tolist()
    counts = Counter(ids)
    first = dict(zip(reversed(ids), reversed(places.tolist()), strict=True))
    ranked = sorted(first, key=lambda token: (-counts[token], first[token]))[:MOST_COVERAGE_WORDS]
    return np.asarray([(first[token], token) for token in ranked], np.int64).reshape(-1, 2)
