"""Documents cut into segments: token ranges that the teacher sees as one context each.

A long document becomes several segments; with an overlap, each but the first begins with tokens that are context only. Row t
predicts token t+1: the last row's label is the next segment's first own token, kept as `next_token`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.corpus.tokens import NONE, TokenizedDocument

COUNTS_NOT, COUNTS, DISTRIBUTION_ONLY = 0, 1, 2
NO_TOKEN = 2**32 - 1


@dataclass(frozen=True, slots=True)
class PlannedSegment:
    """One segment. `loss_mask` as `layout.token_arrays` says; `keyword` bool [n]; `roles` uint8 [n, 4] or [n, 0]; `context_only`
    leading rows that hold no signal; `next_token` the label of the last row or NO_TOKEN; `finished`: the segment ends its document
    as the model would have, by the end-of-text token or a chat's closing turn; `sentences` and `key_words` as of a document, those
    that lie in a segment with rows that count."""

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
    mask[-1] = DISTRIBUTION_ONLY if document.counts[-1] and not document.closed else COUNTS_NOT
    return mask


def cut(document: TokenizedDocument, context: int, overlap: int, source: int, number: int) -> Iterator[PlannedSegment]:
    """Segments of at most `context` tokens; all but the first begin with `overlap` tokens of context."""
    total = len(document.input_ids)
    mask = loss_mask_of(document)
    start, own = 0, 0
    while own < total:
        stop = min(start + context, total)
        segment_mask = mask[start:stop].copy()
        segment_mask[: own - start] = COUNTS_NOT
        keyword = document.keyword[start:stop].copy()
        keyword[: own - start] = False
        yield PlannedSegment(
            input_ids=document.input_ids[start:stop],
            loss_mask=segment_mask,
            byte_end=document.byte_end[start:stop],
            keyword=keyword,
            roles=document.roles[start:stop],
            context_only=own - start,
            next_token=int(document.input_ids[stop]) if stop < total else NO_TOKEN,
            source=source,
            document=number,
            finished=stop == total and document.finished,
            sentences=_inside(document.sentences, start, stop) if segment_mask.any() else NONE,
            key_words=_words_inside(document.key_words, start, stop) if segment_mask.any() else NONE,
        )
        own, start = stop, stop - overlap


def _inside(ranges: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    """Ranges of a document's tokens, what of them lies in start..stop, counted from start."""
    clipped = ranges.clip(start, stop) - start
    found: NDArray[np.int64] = clipped[clipped[:, 0] < clipped[:, 1]]
    return found


def _words_inside(words: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    inside = words[(words[:, 0] >= start) & (words[:, 0] < stop)]
    found: NDArray[np.int64] = inside - np.asarray([start, 0])
    return found
