"""Where in a rendered chat an answer begins and ends, and whether all that was said is there."""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from signal_store.errors import InputError
from teacher_cache.corpus.messages import Dialect, Message
from teacher_cache.corpus.rendering import TAG, MarkedChat, Rendering
from teacher_cache.corpus.special_text import Span, SpecialText
from teacher_cache.corpus.template import REFUSALS, ChatTemplate

SYSTEM_ROLES = ("system", "developer")
LONGEST = 200
"""Characters of the longest special token."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A turn of the assistant: its rendering with all before it, where in that it stands, the character after its end mark."""

    turn: int
    rendering: Rendering
    spans: tuple[Span, ...]
    end: int


def find_answer(chat: MarkedChat, special: SpecialText, turn: int, where: str) -> Answer:
    """The answer of a turn. InputError where it is empty, or where what was said since the answer before is not all rendered."""
    rendering = chat.render(turn + 1)
    since = max((t for t in range(turn) if chat.messages[t]["role"] == "assistant"), default=-1) + 1
    for said in range(since, turn + 1):
        check_said(chat, rendering, said, where)
    own = [rendering.pieces[number] for number, _ in chat.of(turn) if number in rendering.pieces]
    if not own:
        found, place = "the end of the turn alone", f"{where}, turn {turn}"
        raise InputError("an answer is empty", expected="text or a call of a tool", found=found, where=place)
    first, last = min(a for a, _ in own), max(b for _, b in own)
    before, piece = max(
        ((rendering.pieces[n][1], n) for n in _shown(chat, rendering) if chat.pieces[n].message < turn), default=(0, None)
    )
    if first < before:
        expected, found = "an answer after what it answers", f"the text of turn {turn} before that of an earlier one"
        raise InputError("the chat template shows turns in another order", expected=expected, found=found, where=where)
    if chat.template.marks_answers:
        spans = tuple((a, b) for a, b in rendering.generated if a >= min(before, first))
        end = next((b for _, b in spans if b >= last), 0)
        if not spans or spans[0][0] > first or not end:
            raise InputError("the template's {% generation %} leaves out an answer", found=spans, where=f"{where}, turn {turn}")
        return Answer(turn, rendering, spans, end)
    start = min(before + _prompted(chat, special, turn, rendering, (before, first), piece, where), first)
    end = _end_of_turn(chat, special, rendering.text, last)
    return Answer(turn, rendering, ((start, end),), end)


def _shown(chat: MarkedChat, rendering: Rendering) -> Iterator[int]:
    return (number for number in range(len(chat.pieces)) if number in rendering.pieces)


def _prompted(
    chat: MarkedChat, special: SpecialText, turn: int, rendering: Rendering, around: Span, piece: int | None, where: str
) -> int:
    """Characters between the words before an answer, which end with `piece`, and its own that the model was given: as far as the
    generation prompt goes with them. Compared from that piece on, because templates may write other things at the beginning of a
    longer chat. InputError where the prompt leads elsewhere, so that nobody can say what of them is the answer's."""
    before, first = around
    try:
        prompted = chat.render(turn, prompt=True)
    except REFUSALS:
        if turn:
            raise
        return first  # a template that needs a turn before the assistant's: all before the answer's own words
    prompt = prompted.text[prompted.pieces.get(piece, (0, 0))[1] if piece is not None else 0 :]
    between = rendering.text[before:first]
    length = _common_prefix(prompt, rendering.text[before:], special)
    if not (_bare(prompt[length:]) and _bare(between[length:])):
        return length
    if (place := between.rfind(prompt)) >= 0:
        return place + len(prompt)
    raise InputError(
        "the chat template's generation prompt does not lead to an answer, so nobody can say where that begins",
        expected=repr(prompt[length : length + 60]),
        found=repr(between[length : length + 60]),
        where=f"{where}, turn {turn}",
        remedy="Use a template whose generation prompt begins an answer, or one that marks it with {% generation %}.",
    )


def _bare(text: str) -> str:
    """Without the tags and the white space in which prompts and answers may differ."""
    return re.sub(TAG, "", text).strip()


def check_said(chat: MarkedChat, rendering: Rendering, turn: int, where: str) -> None:
    """InputError where something that a turn says is not in the rendering."""
    message = chat.messages[turn]
    missing = [piece.kind for number, piece in chat.of(turn) if number not in rendering.pieces and piece.kind != "reasoning"]
    found = f"no {missing[0]} of turn {turn} ({message['role']})" if missing else None
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        quoted = json.dumps(json.dumps(arguments, ensure_ascii=False), ensure_ascii=False)
        wrong = [form for form in (str(arguments), quoted) if arguments and form in rendering.text]
        lost = [word for word in _words(arguments) if word not in rendering.text]
        if not found and (wrong or lost):
            found = f"{wrong[0]} as arguments of turn {turn}" if wrong else f"no {lost[0]} in the call of turn {turn}"
    if found:
        raise InputError(
            "the chat template leaves out what a chat says",
            expected="every turn's text and calls",
            found=found,
            where=where,
            remedy="Use a template that renders such turns.",
        )


def _words(arguments: Any) -> Iterator[str]:
    """Of a call's arguments what has no marks: names, numbers."""
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            yield name
            yield from _words(value)
    elif isinstance(arguments, list):
        for value in arguments:
            yield from _words(value)
    elif isinstance(arguments, int | float) and not isinstance(arguments, bool):
        yield str(arguments)


def _end_of_turn(chat: MarkedChat, special: SpecialText, text: str, last: int) -> int:
    """Where an answer ends whose last word ends at `last`, in a rendering that ends with it: after the mark that ends every turn,
    not after what is written once at the end of a chat."""
    mark = _end_mark(chat.template, chat.dialect, special)
    place = text.find(mark, last)
    if place >= 0 and mark:
        return place + len(mark)
    ends = [match.end() for match in special.pattern.finditer(text, last)]
    return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)


@functools.lru_cache(maxsize=128)
def _end_mark(template: ChatTemplate, dialect: Dialect, special: SpecialText) -> str:
    """What follows the text of an answer, whether the chat goes on or not; "" where that cannot be told."""
    joint = _joint(template, dialect, special)
    return joint[0] if joint else ""


def reads(template: ChatTemplate, content: Literal["string", "parts"], special: SpecialText) -> bool:
    """Whether a template reads the plainest chat in this form."""
    return _joint(template, Dialect(content, "absent", "object"), special) is not None


@functools.lru_cache(maxsize=128)
def _joint(template: ChatTemplate, dialect: Dialect, special: SpecialText) -> tuple[str, str] | None:
    """The end mark of an answer, and what stands between it and the text of the user's turn that follows; None where the template
    does not say it of the plainest chat."""
    turns: list[Message] = [
        {"role": role, "content": word} for role, word in (("user", "one"), ("assistant", "two"), ("user", "three"))
    ]
    chat = MarkedChat(template, turns, None, dialect)
    try:
        ended, going = chat.render(2), chat.render(3)
    except REFUSALS:
        return None
    if not {0, 1} <= ended.pieces.keys() or not {1, 2} <= going.pieces.keys():
        return None
    final, rest = ended.text[ended.pieces[1][1] :], going.text[going.pieces[1][1] : going.pieces[2][0]]
    shared = _common_prefix(final, rest, special)
    if final[:shared].strip():
        ends = [match.end() for match in special.pattern.finditer(final[:shared])]
        return final[: ends[-1] if ends else shared], rest[shared:]
    mark, instead = special.pattern.search(final), special.pattern.search(rest)
    if mark is None:  # nothing ends an answer but the next turn
        return final, rest
    return final[: mark.end()], rest[instead.end() if instead else 0 :]  # the end of a chat is marked otherwise than a turn's


def with_what_ends_them(chat: MarkedChat, text: str, answers: Sequence[Answer], special: SpecialText) -> tuple[Span, ...]:
    """The spans of answers in one text; where nothing but the next turn ends an answer, with the mark that begins that turn."""
    spans = [span for answer in answers for span in answer.spans]
    if not _end_mark(chat.template, chat.dialect, special).strip():
        following = [special.pattern.match(text, end) for _, end in spans]
        spans = [(a, match.end() if match else b) for (a, b), match in zip(spans, following, strict=True)]
    return tuple(spans)


def prefix_of(chat: MarkedChat, rendering: Rendering, special: SpecialText) -> int:
    """Characters before the first turn that is not the system's: what each window of a long chat begins with."""
    begins = [
        rendering.pieces[number][0]
        for number, piece in enumerate(chat.pieces)
        if number in rendering.pieces and chat.messages[piece.message]["role"] not in SYSTEM_ROLES
    ]
    head = rendering.text[: min(begins, default=0)]
    system = [span[1] for number, span in rendering.pieces.items() if span[1] <= len(head)]
    bos = dict(chat.template.special_tokens).get("bos_token", "")
    joint = _joint(chat.template, chat.dialect, special)
    header = head.rfind(joint[1]) if joint is not None and joint[1] else -1
    if header < max(system, default=0) or head[header + len(joint[1] if joint else "") :].strip():
        header = max(system, default=0)  # no header of a user's turn after the system's: that is in the user's, or there is none
    return max(header, len(bos) if head.startswith(bos) else 0)


def unseen_reasoning(chat: MarkedChat, answers: Sequence[Answer]) -> int:
    """How many of the answers have reasoning that is not in their text."""
    return sum(
        any(piece.kind == "reasoning" and number not in answer.rendering.pieces for number, piece in chat.of(answer.turn))
        for answer in answers
    )


def _common_prefix(one: str, other: str, special: SpecialText) -> int:
    """Characters that two texts begin with, never ending inside a special token or a tag."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for text in (one, other):
        start = max(0, length - LONGEST)
        for match in re.finditer(f"{special.pattern.pattern}|{TAG}", text[start : length + LONGEST]):
            if start + match.start() < length < start + match.end():
                length = start + match.start()
    return length
