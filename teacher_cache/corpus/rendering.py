"""One rendering of a chat, and where in it each piece of its messages stands.

Nothing but the template knows where a message went, or whether it went anywhere. So each piece of text is given to the template
between two marks, characters that no text holds; where the marks come out, the piece is. They stand inside the white space around a
piece, which templates trim, and beside tags that the template looks for; a rendering without marks must come out the same.

Special tokens that a message spells are replaced before by a character each, so that those in the rendering are the template's own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from signal_store.errors import InputError
from teacher_cache.corpus.messages import Dialect, Message
from teacher_cache.corpus.special_text import Span
from teacher_cache.corpus.template import GENERATION, ChatTemplate

FIRST_MARK = 0x100000
BEGINS, ENDS, STANDS_FOR = range(FIRST_MARK, FIRST_MARK + 0xC000, 0x4000)
MOST_SUBSTITUTES = ord(GENERATION[0]) - STANDS_FOR
PRIVATE_CHARACTERS = "[\U00100000-\U0010ffff]"
"""Characters that are set for others while a chat is rendered: the private use of the last plane."""
TAG = r"</?[A-Za-z_][\w-]*>"
MARKS = re.compile(f"[{chr(BEGINS)}-{chr(STANDS_FOR - 1)}{GENERATION[0]}{GENERATION[1]}]")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a message, between tags: whose, and what it is. Reasoning a template may leave out."""

    message: int
    kind: Literal["text", "reasoning", "call"]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered chat: `pieces` by number, those that are in it; `generated`, what the template says the assistant wrote."""

    text: str
    pieces: dict[int, Span]
    generated: tuple[Span, ...]


@dataclass
class Substitutes:
    """The characters that stand for special tokens, and for characters of ours, in the messages of one chat."""

    pattern: re.Pattern[str]
    strings: list[str] = field(default_factory=list)

    def put(self, value: Any) -> Any:
        """The value, or what it holds, with substitutes."""
        if isinstance(value, str):
            return self.pattern.sub(self._character, value)
        if isinstance(value, dict):
            return {self.put(key): self.put(item) for key, item in value.items()}
        return [self.put(item) for item in value] if isinstance(value, list) else value

    def _character(self, match: re.Match[str]) -> str:
        if match[0] not in self.strings:
            self.strings.append(match[0])
        if len(self.strings) > MOST_SUBSTITUTES:
            raise InputError(
                "a chat holds too many different characters of private use, and special tokens",
                expected=f"at most {MOST_SUBSTITUTES}",
            )
        return chr(STANDS_FOR + self.strings.index(match[0]))

    def places(self, text: str) -> Iterator[tuple[int, str]]:
        """Where substitutes stand in a rendered text, and for what."""
        first = chr(STANDS_FOR)
        return ((place, self.strings[ord(char) - STANDS_FOR]) for place, char in enumerate(text) if first <= char < GENERATION[0])


class MarkedChat:
    """The messages of a chat with marks around their pieces, ready to be rendered."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: list[Any] | None,
        dialect: Dialect,
        *,
        inmost: bool = False,
    ) -> None:
        """Marks stand around each piece; `inmost`, in its middle."""
        self._inmost = inmost
        self.template, self.messages, self.tools, self.dialect = template, messages, tools, dialect
        self.pieces: list[Piece] = []
        self._halves: list[tuple[str, str]] = []
        tags = sorted(set(re.findall(TAG, template.source)))
        self._tags = re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None
        self.marked = dialect.spoken([self._message(message, number) for number, message in enumerate(messages)])

    def render(self, count: int, *, prompt: bool = False) -> Rendering:
        """The first `count` messages; with `prompt`, up to where the model would go on. Raises one of `template.REFUSALS`."""
        found = _without_marks(self.template.render(self.marked[:count], self.tools, add_generation_prompt=prompt))
        return self._around_middles(found) if self._inmost else found

    def render_plain(self, count: int, tools: list[Any] | None) -> str:
        """The same text, of messages that were given no marks, and with these tools."""
        return _without_marks(self.template.render(self.dialect.spoken(self.messages[:count]), tools)).text

    def of(self, message: int) -> Iterator[tuple[int, Piece]]:
        """The pieces of a message."""
        return ((number, piece) for number, piece in enumerate(self.pieces) if piece.message == message)

    def _message(self, message: Message, number: int) -> Message:
        found = dict(message)
        if "reasoning_content" in found:  # under two names: the same marks, whichever is read
            found["reasoning_content"] = found["thinking"] = self._text(found["reasoning_content"], Piece(number, "reasoning"))
        if "content" in found:
            found["content"] = self._text(found["content"], Piece(number, "text"))
        if "tool_calls" in found:
            asked = Piece(number, "call")
            found["tool_calls"] = [{**call, "function": self._leaves(call["function"], asked)} for call in found["tool_calls"]]
        return found

    def _leaves(self, value: Any, piece: Piece) -> Any:
        if isinstance(value, str):
            return self._text(value, piece)
        if isinstance(value, dict):
            return {key: self._leaves(item, piece) for key, item in value.items()}
        return [self._leaves(item, piece) for item in value] if isinstance(value, list) else value

    def _text(self, text: str, piece: Piece) -> str:
        parts = self._tags.split(text) if self._tags is not None else [text]
        parts[::2] = [self._between_marks(part, piece) for part in parts[::2]]
        return "".join(parts)

    def _between_marks(self, text: str, piece: Piece) -> str:
        inner = text.strip()
        if not inner:
            return text
        if len(self.pieces) == ENDS - BEGINS:
            raise InputError("a chat has too many turns and tags", expected=f"at most {ENDS - BEGINS} texts between them")
        self.pieces.append(piece)
        number, start = len(self.pieces) - 1, text.index(inner)
        marks = chr(BEGINS + number), chr(ENDS + number)
        if self._inmost:
            middle = start + len(inner) // 2
            self._halves.append((text[start:middle], text[middle : start + len(inner)]))
            return text[:middle] + "".join(marks) + text[middle:]
        return text[:start] + marks[0] + inner + marks[1] + text[start + len(inner) :]

    def _around_middles(self, found: Rendering) -> Rendering:
        """The rendering with spans of whole pieces, those that stand there as they are."""
        pieces = {}
        for number, (middle, _) in found.pieces.items():
            before, after = self._halves[number]
            if found.text.endswith(before, 0, middle) and found.text.startswith(after, middle):
                pieces[number] = middle - len(before), middle + len(after)
        return Rendering(found.text, pieces, found.generated)


def _without_marks(marked: str) -> Rendering:
    begun: dict[int, int] = {}
    pieces: dict[int, Span] = {}
    generated: list[list[int]] = []
    parts: list[str] = []
    length, last = 0, 0
    for match in MARKS.finditer(marked):
        parts.append(marked[last : match.start()])
        length, last = length + match.start() - last, match.end()
        code = ord(match[0])
        if code < ENDS:
            begun[code - BEGINS] = length
        elif code < STANDS_FOR and code - ENDS in begun:
            pieces.setdefault(code - ENDS, (begun[code - ENDS], length))
        elif match[0] == GENERATION[0]:
            generated.append([length, length])
        elif match[0] == GENERATION[1]:
            generated[-1][1] = length
    parts.append(marked[last:])
    return Rendering("".join(parts), pieces, tuple((a, b) for a, b in generated if a < b))
