"""Documents cut into segments: token ranges that the teacher sees as one context each.

A long document becomes several segments; each but the first begins with tokens that are context only: what stands once in a
document and is needed in every window (the tokenizer's beginning of text, a chat's system turn), then the overlap. Row t predicts
token t+1: the last row's label is the next segment's first own token, kept as `next_token`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from signal_store.format.text import NO_TOKEN
from teacher_cache.corpus.tokens import NONE, TokenizedDocument

COUNTS_NOT, COUNTS, DISTRIBUTION_ONLY = 0, 1, 2


@dataclass(frozen=True, slots=True)
class PlannedSegment:
    """One segment. `loss_mask` as `format.text.token_arrays` says; `keyword` bool [n]; `roles` uint8 [n, 4] or [n, 0];
    `context_only` leading rows that hold no signal; `next_token` the label of the last row or NO_TOKEN; `finished`: the segment
    ends its document as the model would have, by the end-of-text token or an answer's last turn; `sentences` and `key_words` as of
    a document, those that lie in a segment with rows that count."""

    input_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.uint8]
    byte_end: NDArray[np.uint32]
    keyword: NDArray[np.bool_]
    roles: NDArray[np.uint8]
    context_only: int
    next_token: int
    source: int
    document: int
    finished: bool
    sentences: NDArray[np.int64]
    key_words: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def token_hash(self) -> int:
        """Eight bytes of BLAKE2b over the ids: ties signals to text."""
        return int.from_bytes(hashlib.blake2b(self.input_ids.astype("<u4").tobytes(), digest_size=8).digest(), "little")


def loss_mask_of(document: TokenizedDocument) -> NDArray[np.uint8]:
    """uint8 [n] of a whole document: what row t, which predicts token t+1, counts for."""
    mask = np.full(len(document.input_ids), COUNTS_NOT, dtype=np.uint8)
    if not len(mask):
        return mask
    mask[:-1] = np.where(document.counts[1:], COUNTS, COUNTS_NOT)
    mask[-1] = DISTRIBUTION_ONLY if document.counts[-1] and not document.ended else COUNTS_NOT
    return mask


def cut(document: TokenizedDocument, context: int, overlap: int, source: int, number: int) -> Iterator[PlannedSegment]:
    """Segments of at most `context` tokens; all but the first begin with the document's prefix and `overlap` tokens of context. The
    prefix of a longer document is at most half of the context, as `filters.fits_context` sees to."""
    total, prefix = len(document.input_ids), document.prefix
    mask = loss_mask_of(document)
    start, own, head = 0, 0, 0
    while own < total:
        stop = min(start + context - head, total)
        rows = np.concatenate([np.arange(head), np.arange(start, stop)])
        context_only = head + own - start
        segment_mask, keyword = mask[rows], document.keyword[rows]
        segment_mask[:context_only] = COUNTS_NOT
        keyword[:context_only] = False
        yield PlannedSegment(
            input_ids=document.input_ids[rows],
            loss_mask=segment_mask,
            byte_end=document.byte_end[rows],
            keyword=keyword,
            roles=document.roles[rows],
            context_only=context_only,
            next_token=int(document.input_ids[stop]) if stop < total else NO_TOKEN,
            source=source,
            document=number,
            finished=stop == total and document.ended,
            sentences=_inside(document.sentences, start, stop, head) if segment_mask.any() else NONE,
            key_words=_words_inside(document.key_words, start, stop, head) if segment_mask.any() else NONE,
        )
        own, head = stop, prefix
        start = max(own - min(overlap, context - prefix - 1), prefix)


def _inside(ranges: NDArray[np.int64], start: int, stop: int, head: int) -> NDArray[np.int64]:
    """Ranges of a document's tokens, what of them lies in start..stop, counted from `head` rows before it."""
    clipped = ranges.clip(start, stop) - start + head
    found: NDArray[np.int64] = clipped[clipped[:, 0] < clipped[:, 1]]
    return found


def _words_inside(words: NDArray[np.int64], start: int, stop: int, head: int) -> NDArray[np.int64]:
    inside = words[(words[:, 0] >= start) & (words[:, 0] < stop)]
    found: NDArray[np.int64] = inside - np.asarray([start - head, 0])
    return found
