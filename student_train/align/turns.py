"""What two chat templates put around the words of a chat, so that a chat rendered by the one can be rendered again by the other.

A template is asked with chats of made-up words: what stands between the words is its own. A template is taken that puts the same
before and after every turn of a role; others are refused. What either puts at one place counts as one symbol of the text, which is
complete where its first special token is: the ends of turns are the same, and so are the words.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError
from student_train.align.spelling import FIRST_MARK, Spelling
from student_train.align.walk import Ints

TURN = chr(0x10FFFE)
"""The symbol of what a template puts, where it holds no special token."""
WORD = "qz{number}zq"
EXAMPLES: tuple[tuple[str, ...], ...] = (
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)


@dataclass(frozen=True)
class Turns:
    """Of one template, strings of symbols: `opening` by the first role, `between` by a role and the next, `closing` by the last.
    `begins`: it opens with what the tokenizer puts before every text, which has no symbols."""

    opening: Mapping[str, str]
    between: Mapping[tuple[str, str], str]
    closing: Mapping[str, str]
    begins: bool

    def after(self, role: str) -> Iterator[tuple[str, str | None]]:
        """(what may follow a turn, the next role; None at the end), the longest first."""
        found: list[tuple[str, str | None]] = [(literal, other) for (own, other), literal in self.between.items() if own == role]
        found += [(literal, None) for last, literal in self.closing.items() if last == role]
        return iter(sorted(found, key=lambda one: -len(one[0])))


@dataclass(frozen=True, slots=True)
class Parsed:
    """A chat: what its template puts at each place, and the words between them, strings of symbols; there is one place more than
    words, but for a chat that is cut off in a turn."""

    roles: tuple[str, ...]
    places: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class TurnPair:
    """Of teacher and student."""

    teacher: Turns
    student: Turns

    @classmethod
    def of(cls, teacher: Spelling, student: Spelling) -> "TurnPair | None":
        """None where the templates are one, or neither tokenizer has one. InputError for a template that cannot be taken apart."""
        templates = [spelling.tokenizer.chat_template for spelling in (teacher, student)]
        if templates[0] == templates[1]:
            return None
        return cls(turns_of(teacher, "the teacher's chat template"), turns_of(student, "the student's chat template"))


def turns_of(spelling: Spelling, where: str) -> Turns:
    """Ask a template.

    Raises:
        InputError: if there is none, or it puts other things around turns of one role.
    """
    opening: dict[str, str] = {}
    between: dict[tuple[str, str], str] = {}
    closing: dict[str, str] = {}
    for roles in EXAMPLES:
        literals = _literals(spelling, roles, where)
        if literals is None and "system" in roles:
            continue  # a template without system turns
        if literals is None:
            raise InputError("no chat can be rendered", expected="a template of users and assistants", where=where)
        found: list[tuple[dict[Any, str], Any, str]] = [(opening, roles[0], literals[0]), (closing, roles[-1], literals[-1])]
        found += [(between, pair, literal) for pair, literal in zip(pairwise(roles), literals[1:-1], strict=True)]
        for known, key, literal in found:
            if known.setdefault(key, literal) != literal:
                raise InputError(
                    "the template puts other things around some turns than around others",
                    expected=f"always {known[key]!a} at {key}",
                    found=f"{literal!a}",
                    where=where,
                    remedy="Take a student with the teacher's template, or one that treats turns alike.",
                )
    puts = "".join(spelling.symbols[token] for token in spelling.put_before)
    begins = bool(puts) and all(literal.startswith(puts) for literal in opening.values())
    return Turns({role: literal.removeprefix(puts) for role, literal in opening.items()}, between, closing, begins)


def _literals(spelling: Spelling, roles: Sequence[str], where: str) -> list[str] | None:
    """What stands before, between and behind the words; None where the template will not render such a chat, or leaves words
    out."""
    words = [WORD.format(number=number) for number in range(len(roles))]
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    text = _rendered(spelling.tokenizer, messages, where)
    if text is None:
        return None
    found = []
    for word in words:
        before, word_there, text = text.partition(word)
        if not word_there:
            return None
        found.append(before)
    return [symbols_of(literal, spelling) for literal in (*found, text)]


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], where: str) -> str | None:
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template, and the cache holds chats", where=where)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # noqa: BLE001  (a template may raise anything at a chat that it was not made for)
        return None


def symbols_of(text: str, spelling: Spelling) -> str:
    """What a template wrote, its special tokens as marks."""
    added = spelling.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    contents = sorted(((added[number].content, symbol) for symbol, number in spelling.marks.items()), key=lambda one: -len(one[0]))
    found, start = [], 0
    while start < len(text):
        mark = next(((content, symbol) for content, symbol in contents if text.startswith(content, start)), None)
        found.append(text[start].encode().decode("latin-1") if mark is None else mark[1])
        start += 1 if mark is None else len(mark[0])
    return "".join(found)


def parse(text: str, turns: Turns) -> Parsed | None:
    """Take a chat apart; None where it is none that the template renders, such as a window that begins inside a turn."""
    for role, literal in sorted(turns.opening.items(), key=lambda one: -len(one[1])):
        if text.startswith(literal):
            found = _from(text, len(literal), role, turns)
            if found is not None:
                return Parsed(found[0], (literal, *found[1]), found[2])
    return None


def _from(text: str, start: int, role: str, turns: Turns) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None:
    """(roles, what follows each turn, words) from the words of a role on."""
    roles, places, words = [role], list[str](), list[str]()
    while True:
        stop = next((n for n in range(start, len(text)) if _ends_turn(text, n, roles[-1], turns)), len(text))
        words.append(text[start:stop])
        if stop == len(text):  # cut off in a turn, or a template that puts nothing at its end
            return tuple(roles), tuple(places), tuple(words)
        rest = text[stop:]
        found = next((one for one in turns.after(roles[-1]) if rest == one[0] or (one[1] and rest.startswith(one[0]))), None)
        if found is None:
            cut_off = any(literal.startswith(rest) for literal, _ in turns.after(roles[-1]))
            return (tuple(roles), (*places, rest), tuple(words)) if cut_off else None
        literal, following = found
        places.append(literal)
        start = stop + len(literal)
        if following is None:
            return tuple(roles), tuple(places), tuple(words)
        roles.append(following)


def _ends_turn(text: str, place: int, role: str, turns: Turns) -> bool:
    """Whether a special token stands here, which words have none of; or what a template puts there that begins with none."""
    if ord(text[place]) >= FIRST_MARK:
        return True
    return any(literal and following and text.startswith(literal, place) for literal, following in turns.after(role))


@dataclass(frozen=True, slots=True)
class ToldChat:
    """A chat in both templates: the student's symbols; `common`, the text that both have, a symbol for each place of a template;
    and by symbols of either side that are spoken, how many of the common ones are, int64."""

    student: str
    common: str
    teacher_places: Ints
    student_places: Ints


def tell_chat(text: str, pair: TurnPair) -> ToldChat | None:
    """Render a chat again; None where it cannot be taken apart, or the student's template lacks a role of it."""
    parsed = parse(text, pair.teacher)
    if parsed is None:
        return None
    places = _places_of(parsed, pair.student)
    if places is None:
        return None
    mine, other, common = [0], [0], list[str]()
    student: list[str] = []
    for number, literal in enumerate(parsed.places):
        own = places[number] if number < len(places) else ""
        spoken = len(common)
        mine += _spoken_in(literal, spoken)
        other += _spoken_in(own, spoken)
        common.append(next((symbol for symbol in literal if ord(symbol) >= FIRST_MARK), TURN))
        student.append(own)
        if number < len(parsed.words):
            word = parsed.words[number]
            reached = range(spoken + 2, spoken + 2 + len(word))
            mine += reached
            other += reached
            common += word
            student.append(word)
    return ToldChat("".join(student), "".join(common), np.asarray(mine, np.int64), np.asarray(other, np.int64))


def _places_of(parsed: Parsed, turns: Turns) -> list[str] | None:
    try:
        found = [turns.opening[parsed.roles[0]]]
        found += [turns.between[pair] for pair in pairwise(parsed.roles)]
        if len(parsed.places) > len(parsed.roles):
            found.append(turns.closing[parsed.roles[-1]])
    except KeyError:
        return None
    return found


def _spoken_in(literal: str, spoken: int) -> list[int]:
    """By symbols of what a template puts: it is spoken where its first special token is, or its last symbol."""
    whole = next((n for n, symbol in enumerate(literal) if ord(symbol) >= FIRST_MARK), len(literal) - 1)
    return [spoken + (number >= whole) for number in range(len(literal))]
