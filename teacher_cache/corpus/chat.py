"""A chat as text, rendered by the tokenizer's own template, and the character spans that the assistant wrote.

Where a template leaves what was said as it was, a chat is one text in which every answer counts. Where it drops or rewrites
earlier turns (their reasoning, mostly), each answer is a text of its own: the history as the model would see it, and that answer
counts. What a chat says and its rendering does not is an error; only reasoning may be left out, and is then counted.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError
from teacher_cache.corpus.document import ChatPart, Document
from teacher_cache.corpus.messages import Dialect, Message, dialects, parse_messages, parse_tools
from teacher_cache.corpus.rendering import OURS, STANDS_FOR, TAG, MarkedChat, Rendering, Substitutes
from teacher_cache.corpus.special_text import Span, SpecialText, special_text
from teacher_cache.corpus.template import REFUSALS, ChatTemplate, template_of

SYSTEM_ROLES = ("system", "developer")
LONGEST = 200
"""Characters of the longest special token."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a recipe says of a source's chats: which of several templates, whether special tokens that a turn spells are tokens."""

    template: str | None = None
    special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A turn of the assistant: its rendering with all before it, where in that it stands, the character after its end mark."""

    turn: int
    rendering: Rendering
    spans: tuple[Span, ...]
    end: int


def render_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Any],
    tools: Any = None,
    *,
    where: str,
    options: ChatOptions = ChatOptions(),
) -> tuple[Document, ...]:
    """The texts of a chat: one, or one for each answer. InputError where the template refuses it or leaves something out, where
    nobody answers, and where an answer is empty."""
    special = special_text(tokenizer)
    parsed, schemas = parse_messages(messages, where), parse_tools(tools, where)
    template = template_of(tokenizer, options.template, tools=schemas is not None, where=where)
    pattern = re.compile(OURS if options.special_tokens else f"{OURS}|{special.pattern.pattern}")
    substitutes = Substitutes(pattern)
    chat, answers = _spoken(template, special, substitutes.put(parsed), substitutes.put(schemas), where)
    try:
        texts = list(_texts(chat, answers, special, where))
    except REFUSALS as error:
        raise error if isinstance(error, InputError) else _refusal(error, where) from error
    if substitutes.strings:
        _check_substitutes(template, chat.dialect, parsed, schemas, texts, substitutes, where)
    return tuple(_restored(text, substitutes, special) for text in texts)


def _spoken(
    template: ChatTemplate, special: SpecialText, messages: list[Message], tools: list[Any] | None, where: str
) -> tuple[MarkedChat, list[Answer]]:
    """The chat in the first form of which the template leaves nothing out, and its answers."""
    refusals: list[tuple[int, Exception]] = []
    for dialect in sorted(dialects(messages), key=lambda dialect: not _reads(template, dialect.content, special)):
        try:
            chat = MarkedChat(template, messages, tools, dialect)
            return chat, [_answer(chat, special, turn, where) for turn, m in enumerate(messages) if m["role"] == "assistant"]
        except REFUSALS as error:
            refusals.append((_obscurity(error, dialect), error))
    told = min(refusals, key=lambda refusal: refusal[0])[1]
    raise told if isinstance(told, InputError) else _refusal(told, where)


def _reads(template: ChatTemplate, content: Literal["string", "parts"], special: SpecialText) -> bool:
    """Whether a template reads the plainest chat in this form."""
    return _joint(template, Dialect(content, "absent", "object"), special) is not None


def _obscurity(error: Exception, dialect: Dialect) -> int:
    """How little an error says of why a template refuses a chat: its own words most, an error of its code, or at a null, least."""
    if dialect.nothing == "null":
        return 2
    return 0 if type(error) is TemplateError else 1 if isinstance(error, InputError) else 2


def _answer(chat: MarkedChat, special: SpecialText, turn: int, where: str) -> Answer:
    rendering = chat.render(turn + 1)
    since = max((t for t in range(turn) if chat.messages[t]["role"] == "assistant"), default=-1) + 1
    for said in range(since, turn + 1):
        _check_said(chat, rendering, said, where)
    own = [rendering.pieces[number] for number, _ in chat.of(turn) if number in rendering.pieces]
    if not own:
        found, place = "the end of the turn alone", f"{where}, turn {turn}"
        raise InputError("an answer is empty", expected="text or a call of a tool", found=found, where=place)
    first, last = min(a for a, _ in own), max(b for _, b in own)
    before = max(
        (rendering.pieces[n][1] for n, p in enumerate(chat.pieces) if p.message < turn and n in rendering.pieces), default=0
    )
    if chat.template.marks_answers:
        spans = tuple((a, b) for a, b in rendering.generated if a >= min(before, first))
        end = next((b for _, b in spans if b >= last), 0)
        if not spans or spans[0][0] > first or not end:
            raise InputError("the template's {% generation %} leaves out an answer", found=spans, where=f"{where}, turn {turn}")
        return Answer(turn, rendering, spans, end)
    start = min(max(_prompted(chat, special, turn, rendering), before), first)
    end = _end_of_turn(chat, special, rendering.text, last)
    return Answer(turn, rendering, ((start, end),), end)


def _prompted(chat: MarkedChat, special: SpecialText, turn: int, rendering: Rendering) -> int:
    """Characters of a rendering that the model was given before this turn."""
    try:
        return _common_prefix(chat.render(turn, prompt=True).text, rendering.text, special)
    except REFUSALS:
        if turn:
            raise
        return len(rendering.text)  # a template that needs a turn before the assistant's: all before the answer's own words


def _check_said(chat: MarkedChat, rendering: Rendering, turn: int, where: str) -> None:
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


def _check_unmarked(chat: MarkedChat, rendering: Rendering, count: int, where: str) -> None:
    """InputError where the template renders other text when it is not told by marks what is whose, or never shows the tools."""
    plain = chat.render_plain(count, chat.tools)
    if plain != rendering.text:
        raise InputError(
            "the chat template changes with what its turns begin or end with, so nobody can say who wrote what",
            found=_difference(plain, rendering.text),
            where=where,
        )
    if chat.tools is not None and plain == chat.render_plain(count, None):
        raise InputError(
            "the chat template leaves out the tools",
            expected="their schemas",
            found="none",
            where=where,
            remedy="Use a template that renders tools, or leave out `tools:` of the source.",
        )


def _end_of_turn(chat: MarkedChat, special: SpecialText, text: str, last: int) -> int:
    """Where an answer ends whose last word ends at `last`, in a rendering that ends with it: after the mark that ends every turn,
    not after what is written once at the end of a chat."""
    mark = _end_mark(chat.template, chat.dialect, special)
    place = text.find(mark, last)
    if place >= 0 and mark:
        return place + len(mark)
    ends = [match.end() for match in special.pattern.finditer(text, last)]
    return ends[-1] if ends else len(text)


@functools.lru_cache(maxsize=128)
def _end_mark(template: ChatTemplate, dialect: Dialect, special: SpecialText) -> str:
    """What follows the text of an answer, whether the chat goes on or not; "" where that cannot be told."""
    joint = _joint(template, dialect, special)
    return joint[0] if joint else ""


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
    mark, instead = (
        special.pattern.search(final),
        special.pattern.search(rest),
    )  # the end of a chat is marked otherwise than a turn's
    return final[: mark.end() if mark else len(final)], rest[instead.end() if instead else 0 :]


def _texts(chat: MarkedChat, answers: Sequence[Answer], special: SpecialText, where: str) -> Iterator[Document]:
    """The chat as documents, still with substitutes in their texts."""
    count, last = len(chat.messages), answers[-1]
    whole = last.rendering if last.turn + 1 == count else chat.render(count)
    if all(whole.text.startswith(answer.rendering.text[: answer.end]) for answer in answers):
        for turn in range(last.turn + 1, count):
            _check_said(chat, whole, turn, where)
        spans = whole.generated if chat.template.marks_answers else tuple(span for answer in answers for span in answer.spans)
        part = ChatPart(0, True, len(answers), _unseen(chat, answers))
        yield _document(chat, whole, spans, count, part, special, where)
        return
    for number, answer in enumerate(answers):
        part = ChatPart(number, False, 1, _unseen(chat, [answer]))
        yield _document(chat, answer.rendering, answer.spans, answer.turn + 1, part, special, where)


def _document(
    chat: MarkedChat,
    rendering: Rendering,
    spans: tuple[Span, ...],
    count: int,
    part: ChatPart,
    special: SpecialText,
    where: str,
) -> Document:
    _check_unmarked(chat, rendering, count, where)
    ended = chat.messages[count - 1]["role"] == "assistant"
    return Document(rendering.text, spans, complete=True, ended=ended, prefix=_prefix(chat, rendering, special), chat=part)


def _prefix(chat: MarkedChat, rendering: Rendering, special: SpecialText) -> int:
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


def _unseen(chat: MarkedChat, answers: Sequence[Answer]) -> int:
    """How many of the answers have reasoning that is not in their text."""
    return sum(
        any(piece.kind == "reasoning" and number not in answer.rendering.pieces for number, piece in chat.of(answer.turn))
        for answer in answers
    )


def _restored(document: Document, substitutes: Substitutes, special: SpecialText) -> Document:
    """With the strings for which substitutes stand; those that spell special tokens are remembered as text."""
    text, moved, spelled, last, added = [], [], [], 0, 0
    for place, string in substitutes.places(document.text):
        text += [document.text[last:place], string]
        if special.pattern.fullmatch(string):
            spelled.append((place + added, place + added + len(string)))
        added += len(string) - 1
        moved.append((place, added))
        last = place + 1
    if not moved:
        return document
    to = functools.partial(_moved, moved)
    return Document(
        "".join((*text, document.text[last:])),
        tuple((to(a), to(b)) for a, b in document.counted or ()),
        complete=True,
        ended=document.ended,
        prefix=to(document.prefix),
        chat=document.chat,
        spelled=tuple(spelled),
    )


def _moved(moved: Sequence[tuple[int, int]], place: int) -> int:
    """Where a place is once the substitutes before it have become strings."""
    return place + next((added for at, added in reversed(moved) if at < place), 0)


def _check_substitutes(
    template: ChatTemplate,
    dialect: Dialect,
    messages: list[Message],
    tools: list[Any] | None,
    texts: Sequence[Document],
    substitutes: Substitutes,
    where: str,
) -> None:
    """InputError where the template does something else at special tokens that a turn spells than write them down."""
    chat = MarkedChat(template, messages, tools, dialect)
    restored = "".join(substitutes.strings[ord(char) - STANDS_FOR] if char >= chr(STANDS_FOR) else char for char in texts[-1].text)
    count = len(messages) if len(texts) == 1 else max(t for t, m in enumerate(messages) if m["role"] == "assistant") + 1
    try:
        plain = chat.render_plain(count, tools)
    except REFUSALS as error:
        raise _refusal(error, where) from error
    if plain != restored:
        raise InputError(
            "the chat template reads special tokens that a turn spells",
            expected="turns without them",
            found=_difference(plain, restored),
            where=where,
            remedy="Give the source special_tokens: tokens.",
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


def _difference(plain: str, marked: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(plain, marked, strict=False)) if a != b), min(len(plain), len(marked)))
    return f"{plain[place : place + 30]!r} and {marked[place : place + 30]!r}"


def _refusal(error: Exception, where: str) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        "the chat template refuses a chat", found=reason[:300], where=where, remedy="Mend the chat, or its roles' order."
    )
