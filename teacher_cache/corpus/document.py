"""One text of a source, before tokens."""

from dataclasses import dataclass

from signal_store.manifest import Task


@dataclass(frozen=True, slots=True)
class Document:
    """A text. `counted` are the character spans whose tokens count in the loss, None for all of it; `lexer` names the Pygments
    lexer of its keywords; `complete` says that the text brings its own special tokens (a rendered chat); `task` what it asks
    for; `prose_keywords` whether connectives and predicates are keywords."""

    text: str
    counted: tuple[tuple[int, int], ...] | None = None
    lexer: str | None = None
    complete: bool = False
    task: Task | None = None
    prose_keywords: bool = False

    @property
    def prompt_end(self) -> int:
        """Characters before the first that counts; of plain text, none."""
        return self.counted[0][0] if self.counted else 0
