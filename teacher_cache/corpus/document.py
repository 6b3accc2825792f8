"""One text of a source, before tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A text. `counted` are the character spans whose tokens count in the loss, None for all of it; `lexer` names the Pygments
    lexer of its keywords; `complete` says that the text brings its own special tokens (a rendered chat)."""

    text: str
    counted: tuple[tuple[int, int], ...] | None = None
    lexer: str | None = None
    complete: bool = False
