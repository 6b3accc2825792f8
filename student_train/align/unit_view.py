"""A unit of a cache as a student with another tokenizer reads it: its tokens, and how each of their rows stands to the teacher's.

Everything is a function of the cache's own text and of the two tokenizers. The text comes from the cache: what its tokens spell,
held against where the cache says that they end.
"""

import io
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.align.retokenise import CONTINUATION, Retokenised, cut_at_end, retokenise
from student_train.align.spelling import FIRST_MARK, Spelling
from student_train.align.turns import TurnPair, tell_chat
from student_train.align.vocabularies import Vocabularies
from student_train.align.walk import Ints, align

COUNTS = 1
"""Of `tokens/loss_mask`: the row's label and its distribution count."""


@dataclass(frozen=True)
class UnitView:
    """`length` uint32 [segments].

    `refused` uint32 [1]: how many of them one of the tokenizers changes; these have no tokens, nor have chats that cannot be told.
    Of the student's m tokens: `input_ids` uint32; `counts` bool, whether the row's label counts; `teacher` int32, the teacher's
    row, by its place in the segment, -1 for none; `spoken` uint16, `one_to_one` and `within` bool, as `Alignment` has them; `first`
    and `last` uint32, as `AlignedRows` has them; `text_bytes` uint16, how many of the text the token is.
    """

    length: NDArray[np.uint32]
    refused: NDArray[np.uint32]
    input_ids: NDArray[np.uint32]
    counts: NDArray[np.bool_]
    teacher: NDArray[np.int32]
    spoken: NDArray[np.uint16]
    one_to_one: NDArray[np.bool_]
    within: NDArray[np.bool_]
    first: NDArray[np.uint32]
    last: NDArray[np.uint32]
    text_bytes: NDArray[np.uint16]

    @cached_property
    def same_text(self) -> NDArray[np.bool_]:
        """bool [m]: rows that know the same text as the teacher's row beside them."""
        found: NDArray[np.bool_] = (self.teacher >= 0) & (self.spoken == 0)
        return found

    @cached_property
    def token_start(self) -> Ints:
        """int64 [segments + 1]: the first token of each segment, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self.length, dtype=np.int64)])

    def to_bytes(self) -> bytes:
        """As it is stored."""
        buffer = io.BytesIO()
        np.savez(buffer, **{field.name: getattr(self, field.name) for field in fields(self)})
        return bytes(Zstd(level=3).encode(buffer.getvalue()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` wrote."""
        with np.load(io.BytesIO(Zstd().decode(data)), allow_pickle=False) as found:
            return cls(**{field.name: found[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class SegmentText:
    """What a segment's tokens spell: `symbols`, and `ends` int64 [n] where each ends. `bare`: the number of the token that spells a
    space besides, which its tokenizer puts before every text; -1 for none."""

    symbols: str
    ends: Ints
    bare: int


UNTOLD = Retokenised(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))
"""Of a segment that cannot be told."""


def view_unit(
    cache: Cache, unit: int, vocabularies: Vocabularies, turns: TurnPair | None = None, *, raises: bool = False
) -> UnitView:
    """Tell a unit's segments again in the student's tokens; chats in its template, where that is another (`turns`). A chat that
    cannot be told, such as a window that begins inside a turn, has no tokens; nor has a segment that one of the tokenizers changes,
    unless it `raises` MismatchError with the first place that differs.
    """
    columns = cache.segment_columns(unit, "token_start", "length", "context_only", "source")
    starts = columns["token_start"].astype(np.int64) - unit * cache.manifest.plan.unit_tokens
    lengths = columns["length"].astype(np.int64)
    rows = int(starts[-1] + lengths[-1])
    read = cache.read_unit(unit, dict.fromkeys(("tokens/input_ids", "tokens/loss_mask", "tokens/byte_end"), rows))
    parts: list[dict[str, NDArray[np.generic]]] = []
    refused = 0
    for number, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        own = slice(start, start + length)
        where = f"{cache.uri}, segment {cache.first_segment(unit) + number}"
        ids, mask, byte_end = (read[f"tokens/{name}"][own].astype(np.int64) for name in ("input_ids", "loss_mask", "byte_end"))
        is_chat = cache.sources[int(columns["source"][number])].chats is not None
        try:
            told = segment_text(ids, byte_end, int(columns["context_only"][number]), vocabularies.teacher, where)
            parts.append(_segment(told, mask, vocabularies, turns if is_chat else None, where))
        except MismatchError:
            if raises:
                raise
            refused += 1
            parts.append(_aligned(SegmentText("", ids[:0], -1), mask[:0], UNTOLD, vocabularies))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths_told = np.asarray([len(part["input_ids"]) for part in parts], np.uint32)
    return UnitView(lengths_told, np.asarray([refused], np.uint32), **joined)


def _segment(
    teacher: SegmentText, mask: Ints, both: Vocabularies, turns: TurnPair | None, where: str
) -> dict[str, NDArray[np.generic]]:
    if turns is None:
        return _aligned(teacher, mask, retokenise(teacher.symbols, both.student, where), both)
    chat = tell_chat(teacher.symbols, turns)
    if chat is None:
        return _aligned(teacher, mask, UNTOLD, both)
    own = retokenise(chat.student, both.student, where, begins=turns.student.begins)
    common = SegmentText(chat.common, chat.teacher_places[teacher.ends], teacher.bare)
    return _aligned(common, mask, replace(own, ends=chat.student_places[own.ends]), both)


def _aligned(teacher: SegmentText, mask: Ints, told: Retokenised, both: Vocabularies) -> dict[str, NDArray[np.generic]]:
    found = align(teacher.ends, told.ends)
    # A token that spells a space which the text has not is another in the vocabulary than in the text: nothing is compared there.
    bare = np.append(told.bare, False)[1:] | ((found.teacher >= 0) & (found.teacher + 1 == teacher.bare))
    ranges = np.zeros((len(told.ends), 2), np.int64)
    ranges[:, 1] = len(both.teacher.symbols)
    for row in np.flatnonzero((found.spoken > 0) & ~bare).tolist():
        end = int(told.ends[row])
        ranges[row] = both.places_that_begin(teacher.symbols[end - int(found.spoken[row]) : end])
    begins = np.append(0, told.ends)[: len(told.ends)]
    is_mark = np.isin(told.input_ids, list(both.student.marks.values()))
    return {
        "input_ids": told.input_ids.astype(np.uint32),
        "counts": _counts(mask, teacher.ends, told.ends),
        "teacher": np.where(bare, -1, found.teacher).astype(np.int32),
        "spoken": found.spoken.clip(0, np.iinfo(np.uint16).max).astype(np.uint16),
        "one_to_one": found.one_to_one & ~bare,
        "within": found.within & ~bare,
        "first": ranges[:, 0].astype(np.uint32),
        "last": ranges[:, 1].astype(np.uint32),
        "text_bytes": np.where(is_mark, 0, told.ends - begins).astype(np.uint16),
    }


def segment_text(ids: Ints, byte_end: Ints, context_only: int, teacher: Spelling, where: str) -> SegmentText:
    """What a segment's tokens spell, held against where the cache says that they end in their document. Of the tokens that are
    context only some may stand at another place of it, as the turn that is put before each window of a chat.

    Raises:
        MismatchError: where that differs.
    """
    text, ends = teacher.spelled(ids)
    leading = teacher.leading(ids)
    is_mark = np.asarray([len(s) == 1 and ord(s) >= FIRST_MARK for s in (teacher.symbols[n] for n in ids.tolist())], bool)
    widths = np.where(is_mark, np.diff(byte_end, prepend=byte_end[:1]), np.diff(ends, prepend=0))  # a mark's name may be text
    apart = byte_end - widths.cumsum()
    inside = np.asarray([ord(text[end]) in CONTINUATION if end < len(text) else False for end in ends.tolist()], bool)
    inside[-1] |= cut_at_end(text) > 0
    known = np.flatnonzero(~inside & ~is_mark & (np.arange(len(ids)) >= leading))
    bare = -1
    if len(known) and apart[known].min() == -1 and text.startswith(" "):  # SentencePiece puts a space before a text
        text, ends, apart, bare = text[1:], (ends - 1).clip(0), apart + 1, leading
        known = known[ends[known] > 0]
    if not len(known):
        return SegmentText(text, ends, bare)
    steps = np.diff(apart[known], prepend=max(0, apart[known[0]]))
    moved = np.flatnonzero(steps)
    at_seam = len(moved) == 1 and steps[moved[0]] > 0 and known[moved[0]] <= context_only
    if len(moved) and not at_seam:
        place = int(known[moved[0]])
        raise MismatchError(
            "the teacher's tokens do not spell the text that they were made of",
            expected=f"token {place} to end at byte {int(byte_end[place])} of its document",
            found=int(byte_end[place] - steps[moved[0]]),
            where=where,
            remedy="Its tokenizer changes texts (case, normalisation): a student needs that tokenizer too.",
        )
    return SegmentText(text, ends, bare)


def _counts(mask: Ints, teacher_ends: Ints, student_ends: Ints) -> NDArray[np.bool_]:
    """Whether the token that a row of the student predicts is of text all of which counts."""
    bad = np.append(1, mask[:-1] != COUNTS)  # by the teacher's token: whether predicting it does not count
    before = np.concatenate([[0], np.cumsum(bad)])
    stops = np.append(student_ends, 0)[1:]
    first = np.searchsorted(teacher_ends, student_ends, side="right")
    last = np.searchsorted(teacher_ends, stops, side="left")
    spells = stops > student_ends
    inside = spells & (last < len(teacher_ends))
    last = last.clip(0, len(teacher_ends) - 1)
    first = np.minimum(first, last)
    counts: NDArray[np.bool_] = inside & (before[last + 1] - before[first] == 0)
    return counts
