"""A chat as text, rendered by the tokenizer's own template, and the character spans that the assistant wrote.

Where a template leaves what was said as it was, a chat is one text in which every answer counts. Where it drops or rewrites
earlier turns (their reasoning, mostly), each answer is a text of its own: the history as the model would see it, and that answer
counts. What a chat says and its rendering does not is an error; only reasoning may be left out, and is then counted.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError
from teacher_cache.corpus.answers import Answer, check_said, find_answer, prefix_of, reads, unseen_reasoning, with_what_ends_them
from teacher_cache.corpus.document import ChatPart, Document
from teacher_cache.corpus.messages import Dialect, Message, dialects, parse_messages, parse_tools
from teacher_cache.corpus.rendering import PRIVATE_CHARACTERS, STANDS_FOR, MarkedChat, Rendering, Substitutes
from teacher_cache.corpus.special_text import Span, SpecialText, special_text
from teacher_cache.corpus.template import REFUSALS, ChatTemplate, template_of


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a recipe says of a source's chats: which of several templates, whether special tokens that a turn spells are tokens."""

    template: str | None = None
    special_tokens: bool = False


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
    pattern = re.compile(PRIVATE_CHARACTERS if options.special_tokens else f"{PRIVATE_CHARACTERS}|{special.pattern.pattern}")
    substitutes = Substitutes(pattern)
    dialect, texts = _spoken(template, special, substitutes.put(parsed), substitutes.put(schemas), where)
    if substitutes.strings:
        _check_substitutes(template, dialect, parsed, schemas, texts, substitutes, where)
    return tuple(_restored(text, substitutes, special) for text in texts)


class _MarksShowError(InputError):
    """The rendering is another one with marks than without."""


class _ToolsUnseenError(InputError):
    """All was rendered but the schemas of tools."""


def _spoken(
    template: ChatTemplate, special: SpecialText, messages: list[Message], tools: list[Any] | None, where: str
) -> tuple[Dialect, list[Document]]:
    """The first form of the chat of which the template leaves nothing out, and its documents, still with substitutes."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    refusals: list[tuple[int, Exception]] = []
    for inmost in (False, True):  # marks around texts; where the template looks at how texts begin or end, in their middle
        if inmost and not any(isinstance(error, _MarksShowError) for _, error in refusals):
            break
        for dialect in sorted(dialects(messages), key=lambda dialect: not reads(template, dialect.content, special)):
            try:
                chat = MarkedChat(template, messages, tools, dialect, inmost=inmost)
                answers = [find_answer(chat, special, turn, where) for turn in turns]
                return dialect, list(_texts(chat, answers, special, where))
            except REFUSALS as error:
                refusals.append((_obscurity(error, dialect), error))
    told = min(refusals, key=lambda refusal: refusal[0])[1]
    raise told if isinstance(told, InputError) else _refusal(told, where)


def _obscurity(error: Exception, dialect: Dialect) -> int:
    """How little an error says of why a template refuses a chat: its own words most, an error of its code, or at a null, least."""
    if isinstance(error, _ToolsUnseenError):
        return 0
    if dialect.nothing == "null":
        return 2
    return 0 if type(error) is TemplateError else 1 if isinstance(error, InputError) else 2


def _check_unmarked(chat: MarkedChat, rendering: Rendering, count: int, where: str) -> None:
    """InputError where the template renders other text when it is not told by marks what is whose, or never shows the tools."""
    plain = chat.render_plain(count, chat.tools)
    if plain != rendering.text:
        raise _MarksShowError(
            "the chat template changes what turns say, so nobody can say who wrote what",
            found=_difference(plain, rendering.text),
            where=where,
        )
    if chat.tools is not None and plain == chat.render_plain(count, None):
        raise _ToolsUnseenError(
            "the chat template leaves out the tools",
            expected="their schemas",
            found="none",
            where=where,
            remedy="Use a template that renders tools, or leave out `tools:` of the source.",
        )


def _texts(chat: MarkedChat, answers: Sequence[Answer], special: SpecialText, where: str) -> Iterator[Document]:
    """The chat as documents."""
    count, last = len(chat.messages), answers[-1]
    whole = last.rendering if last.turn + 1 == count else chat.render(count)
    if all(whole.text.startswith(answer.rendering.text[: answer.end]) for answer in answers):
        for turn in range(last.turn + 1, count):
            check_said(chat, whole, turn, where)
        spans = whole.generated if chat.template.marks_answers else with_what_ends_them(chat, whole.text, answers, special)
        part = ChatPart(0, True, len(answers), unseen_reasoning(chat, answers))
        yield _document(chat, whole, spans, count, part, special, where)
        return
    for number, answer in enumerate(answers):
        part = ChatPart(number, False, 1, unseen_reasoning(chat, [answer]))
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
    said = max((rendering.pieces[number][1] for number, _ in chat.of(count - 1) if number in rendering.pieces), default=0)
    ended = chat.messages[count - 1]["role"] == "assistant" and bool(rendering.text[said:].strip())
    return Document(rendering.text, spans, complete=True, ended=ended, prefix=prefix_of(chat, rendering, special), chat=part)


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
    restored = "".join(substitutes.strings[ord(char) - STANDS_FOR] if char >= chr(STANDS_FOR) else char for char in texts[-1].text)
    whole = texts[-1].chat is not None and texts[-1].chat.whole
    count = len(messages) if whole else max(t for t, m in enumerate(messages) if m["role"] == "assistant") + 1
    try:
        plain = template.render(dialect.spoken(messages[:count]), tools, marked=False)
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


def _difference(plain: str, marked: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(plain, marked, strict=False)) if a != b), min(len(plain), len(marked)))
    return f"{plain[place : place + 30]!r} and {marked[place : place + 30]!r}"


def _refusal(error: Exception, where: str) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        "the chat template refuses a chat", found=reason[:300], where=where, remedy="Mend the chat, or its roles' order."
    )
