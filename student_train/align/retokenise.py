"""A segment's own text in the student's tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from signal_store.errors import InputError, MismatchError
from student_train.align.spelling import FIRST_MARK, Spelling, runs_of, same_symbols
from student_train.align.walk import Ints

CONTINUATION = range(0x80, 0xC0)
"""Bytes that are inside a character of UTF-8."""
LONGEST_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class Retokenised:
    """Ids int64 [m], and where each ends among the segment's symbols, int64 [m]; `bare` bool [m]: the token spells a space that the
    text has not, which its tokenizer puts before every text. What is cut in the middle of a character is not among them."""

    input_ids: Ints
    ends: Ints
    bare: NDArray[np.bool_]


def retokenise(text: str, student: Spelling, where: str, *, begins: bool = True) -> Retokenised:
    """The student's tokens of a string of symbols, `begins`: behind what its tokenizer puts before every text.

    Raises:
        MismatchError: if the student's tokens spell another text, naming where it begins to differ; or if the student has no token
            for a mark.
    """
    ids = list(student.put_before) if begins else []
    ends, bare = [0] * len(ids), [False] * len(ids)
    for start, run in runs_of(text):
        if ord(run[0]) >= FIRST_MARK:
            if run not in student.marks:
                raise _no_mark(where, start)
            ids.append(student.marks[run])
            ends.append(start + 1)
            bare.append(False)
            continue
        first, last = start + _cut_at_beginning(run), start + len(run) - cut_at_end(run)
        own, own_ends, has_space = _tokens(text[first:last], student, where, first)
        ids += own
        ends += (own_ends + first).tolist()
        bare += [has_space and number == 0 for number in range(len(own))]
    return Retokenised(np.asarray(ids, np.int64), np.asarray(ends, np.int64), np.asarray(bare, bool))


def _tokens(run: str, student: Spelling, where: str, first: int) -> tuple[list[int], Ints, bool]:
    """Of a run of bytes: ids, where each ends, and whether the first spells a space that the run has not."""
    if not run:
        return [], np.zeros(0, np.int64), False
    try:
        words = run.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise InputError("a text that is no UTF-8", found=str(error), where=f"{where}, byte {first + error.start}") from error
    backend = student.tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True  # what a text spells is text
    try:
        ids = backend.encode(words, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = before
    spelled = "".join(student.symbols[token] for token in ids)
    lengths = np.asarray([len(student.symbols[token]) for token in ids], np.int64)
    has_space = spelled == " " + run and bool(lengths[0])  # SentencePiece puts one before a text
    if has_space:
        spelled, lengths[0] = run, lengths[0] - 1
    if spelled != run:
        raise _other_text(run, spelled, where, first)
    return ids, lengths.cumsum(), has_space


def _other_text(run: str, spelled: str, where: str, first: int) -> MismatchError:
    place = same_symbols(run, spelled)
    return MismatchError(
        "the student's tokenizer changes the text",
        expected=run[place : place + 16].encode("latin-1"),
        found=spelled[place : place + 16].encode("latin-1", "replace"),
        where=f"{where}, byte {first + place}",
        remedy="Take a student whose tokenizer keeps every byte: no lower case, no normalisation.",
    )


def _no_mark(where: str, place: int) -> MismatchError:
    return MismatchError(
        "the text holds a special token that the student's tokenizer lacks",
        expected="one spelled alike, or both the end of a text",
        where=f"{where}, place {place}",
    )


def _cut_at_beginning(run: str) -> int:
    """Bytes of a character whose beginning is not there."""
    return next((place for place, byte in enumerate(run) if ord(byte) not in CONTINUATION), len(run))


def cut_at_end(run: str) -> int:
    """Bytes of a character whose end is not there."""
    for back in range(1, min(LONGEST_CHARACTER_BYTES, len(run)) + 1):
        byte = ord(run[-back])
        if byte in CONTINUATION:
            continue
        length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
        return back if back < length else 0
    return 0
