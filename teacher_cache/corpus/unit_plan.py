"""What a unit is made of, as planned: its tokens, its segments, the positions its signals are taken at. One small file a unit."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray
from safetensors.numpy import load, save

from signal_store.canonical import sha256
from signal_store.errors import CorruptError
from signal_store.format.text import NO_TOKEN
from teacher_cache.corpus.segments import PlannedSegment

LATER = ("roles", "sentences", "key_words")
"""Columns that are not stored where they are empty: a plan without them is what it was before there were any."""


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """Tokens of a unit's segments end to end, and columns of one row per segment. Places (`token_start`, `keyword`) count from
    the unit's first token."""

    input_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.uint8]
    byte_end: NDArray[np.uint32]
    keyword: NDArray[np.int64]
    token_start: NDArray[np.int64]
    length: NDArray[np.int64]
    context_only: NDArray[np.int64]
    next_token: NDArray[np.int64]
    source: NDArray[np.int64]
    document: NDArray[np.int64]
    token_hash: NDArray[np.uint64]
    finished: NDArray[np.uint8]
    roles: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    """uint8 [tokens, 4] as `signal_store.format.roles` names them; empty where no source has a tagger, and not stored then."""
    sentences: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """[s, 2]: first token and the one after the last of each sentence of a question; not stored where there is none."""
    key_words: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """[w, 2]: place and token id of each key word of a text to sum up, by segment; not stored where there is none."""

    @classmethod
    def of(cls, segments: Sequence[PlannedSegment]) -> Self:
        """The plan of a unit that holds these segments, in order."""
        lengths = np.asarray([len(s) for s in segments], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        return cls(
            input_ids=np.concatenate([s.input_ids for s in segments]),
            loss_mask=np.concatenate([s.loss_mask for s in segments]),
            byte_end=np.concatenate([s.byte_end for s in segments]),
            keyword=np.flatnonzero(np.concatenate([s.keyword for s in segments])),
            token_start=starts,
            length=lengths,
            context_only=np.asarray([s.context_only for s in segments], dtype=np.int64),
            next_token=np.asarray([s.next_token for s in segments], dtype=np.int64),
            source=np.asarray([s.source for s in segments], dtype=np.int64),
            document=np.asarray([s.document for s in segments], dtype=np.int64),
            token_hash=np.asarray([s.token_hash for s in segments], dtype=np.uint64),
            finished=np.asarray([s.finished for s in segments], dtype=np.uint8),
            roles=np.concatenate([s.roles for s in segments]),
            sentences=np.concatenate([s.sentences + start for s, start in zip(segments, starts, strict=True)]),
            key_words=np.concatenate([s.key_words + np.asarray([start, 0]) for s, start in zip(segments, starts, strict=True)]),
        )

    def to_bytes(self) -> bytes:
        """The stored form: safetensors, zstd."""
        columns = {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}
        columns = {name: column for name, column in columns.items() if name not in LATER or column.size}
        return bytes(zstd.compress(save(columns), 3))

    @classmethod
    def from_bytes(cls, data: bytes, expected_digest: str, where: str) -> Self:
        """The inverse of `to_bytes`; CorruptError if the bytes are not the planned ones."""
        found = sha256(data)
        if found != expected_digest:
            raise CorruptError("a planned unit was altered", expected=expected_digest, found=found, where=where)
        return cls(**load(bytes(zstd.decompress(data))))

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return len(self.input_ids)

    @property
    def segment_of_token(self) -> NDArray[np.int64]:
        """int64 [tokens]: number of the segment a token belongs to."""
        return np.repeat(np.arange(len(self.length)), self.length)

    @property
    def place_in_segment(self) -> NDArray[np.int64]:
        """int64 [tokens]: place of a token in its segment."""
        return np.arange(self.num_tokens) - self.token_start[self.segment_of_token]

    @property
    def is_context(self) -> NDArray[np.bool_]:
        """bool [tokens]: rows that are there as context only and hold no signal."""
        return self.place_in_segment < self.context_only[self.segment_of_token]

    def rows_per_segment(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of the (ascending) positions each segment has."""
        return np.bincount(self.segment_of_token[positions], minlength=len(self.length)).astype(np.int64)

    def labels(self) -> NDArray[np.int64]:
        """int64 [tokens]: the next token of each row, -1 where none is stored."""
        labels = np.append(self.input_ids[1:].astype(np.int64), -1)
        last = self.token_start + self.length - 1
        labels[last] = np.where(self.next_token == NO_TOKEN, -1, self.next_token)
        return labels
