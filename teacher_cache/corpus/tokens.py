"""Documents as token ids, with what is known of each token: where it ends, whether it counts, whether it is a keyword."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from signal_store.format.roles import LEVELS
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.keywords import keyword_spans, prose_keywords
from teacher_cache.corpus.passages import key_words, sentences
from teacher_cache.corpus.special_text import Encoded, special_text

DOCUMENTS_PER_CALL = 256
NONE: NDArray[np.int64] = np.zeros((0, 2), np.int64)
RolesOf = Callable[[Document, NDArray[np.int64]], tuple[NDArray[np.uint8], NDArray[np.bool_]]]


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """`input_ids` uint32 [n]; `byte_end` uint32 [n], end of each token in the document's UTF-8; `counts` bool [n], whether
    predicting this token counts; `keyword` bool [n]; `roles` uint8 [n, 4], or [n, 0] where nobody tags; `ended`: the document ends
    as the model would end it, by the end-of-text token or an answer's last turn; the first `prefix` tokens stand in front of each
    window of a document that is cut; `sentences` int64 [s, 2] (first token, one after the last) of a question's prompt, `key_words`
    int64 [w, 2] (place, token) of a prompt to sum up."""

    input_ids: NDArray[np.uint32]
    byte_end: NDArray[np.uint32]
    counts: NDArray[np.bool_]
    keyword: NDArray[np.bool_]
    roles: NDArray[np.uint8]
    ended: bool
    prefix: int
    sentences: NDArray[np.int64]
    key_words: NDArray[np.int64]


def tokenize(
    found: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    append_eos: bool,
    keywords: frozenset[str],
    roles_of: RolesOf | None = None,
) -> Iterator[TokenizedDocument]:
    """Each document's tokens, in order; a few hundred documents go through the tokenizer at a time. `roles_of` gives the roles of
    spans of characters."""
    pending = iter(found)
    while batch := list(islice(pending, DOCUMENTS_PER_CALL)):
        yield from _tokenize_batch(batch, tokenizer, append_eos, keywords, roles_of)


def _tokenize_batch(
    batch: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    append_eos: bool,
    keywords: frozenset[str],
    roles_of: RolesOf | None,
) -> Iterator[TokenizedDocument]:
    special = special_text(tokenizer)
    encoded: dict[bool, Iterator[Encoded]] = {}
    for complete in (False, True):
        some = [document for document in batch if document.complete == complete]
        texts, spelled = [document.text for document in some], [document.spelled for document in some]
        encoded[complete] = iter(special.encode(texts, spelled, add_special_tokens=not complete))
    for document in batch:
        ids, spans, char_end, ended, prefix = _closed(
            next(encoded[document.complete]), document, tokenizer.eos_token_id, append_eos
        )
        counts = np.ones(len(ids), dtype=bool)
        if document.counted is not None:
            counts[: len(spans)] = _covered(spans, document.counted)
            counts[len(spans) :] = document.counted[-1:] and document.counted[-1][1] == len(document.text)
        keyword = np.zeros(len(ids), dtype=bool)
        if document.lexer is not None and keywords:
            last_chars = np.asarray([end - 1 for _, end in keyword_spans(document.text, document.lexer, keywords)], dtype=np.int64)
            keyword[_token_of(spans, last_chars)] = True
        roles = np.zeros((len(ids), 0 if roles_of is None else len(LEVELS)), np.uint8)
        if roles_of is not None:
            roles[: len(spans)], begins_word = roles_of(document, spans)
            if document.prose_keywords and keywords:
                keyword[: len(spans)] = prose_keywords(roles[: len(spans)], begins_word)
        prompt = int(counts.argmax()) if counts.any() else 0
        yield TokenizedDocument(
            ids,
            _byte_ends(document.text, char_end),
            counts,
            keyword,
            roles,
            ended,
            prefix,
            sentences(document, spans) if document.task == "qa" else NONE,
            key_words(ids, roles, begins_word, prompt) if document.task == "summary" else NONE,
        )


def _closed(
    encoded: Encoded, document: Document, eos: int | None, append_eos: bool
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64], bool, int]:
    """Ids of a document with what ends it; spans of those with text; where each id ends, in characters; whether it is ended; how
    many tokens stand in front of each window."""
    ids, kept = encoded.input_ids, len(encoded.input_ids) - encoded.trailing
    spans = encoded.spans[:kept]
    if document.complete:
        prefix = int(np.searchsorted(np.maximum.accumulate(spans[:, 1]), document.prefix, side="right")) if document.prefix else 0
        return ids, spans, np.maximum.accumulate(spans[:, 1]), document.ended, prefix
    if append_eos and eos is not None and ids[-1:].tolist() != [eos]:
        ids = np.append(ids, np.uint32(eos))
    char_end = np.maximum.accumulate(np.append(spans[:, 1], np.full(len(ids) - kept, len(document.text))))
    return ids, spans, char_end, eos is not None and ids[-1:].tolist() == [eos], encoded.leading


def _covered(spans: NDArray[np.int64], counted: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Whether a token holds text of a counted span; tokens without text (special ones outside) do not."""
    covered = np.zeros(len(spans), dtype=bool)
    for start, end in counted:
        covered |= (spans[:, 0] < end) & (spans[:, 1] > start)
    return covered


def _token_of(spans: NDArray[np.int64], chars: NDArray[np.int64]) -> NDArray[np.int64]:
    """The token that holds each character: the first that ends after it."""
    tokens = np.searchsorted(np.maximum.accumulate(spans[:, 1]), chars, side="right") if len(spans) else np.zeros(0, np.int64)
    return tokens[tokens < len(spans)]


def _byte_ends(text: str, char_end: NDArray[np.int64]) -> NDArray[np.uint32]:
    if text.isascii():
        return char_end.astype(np.uint32)
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])[char_end].astype(np.uint32)
