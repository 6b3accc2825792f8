"""One text of a source, before tokens."""

from dataclasses import dataclass

from signal_store.manifest import ChatCounts, Task


@dataclass(frozen=True, slots=True)
class ChatPart:
    """What of a chat a text is: all of it, or the `number`-th of its texts. So many answers count in it; of `unseen_reasoning` of
    them the template shows no reasoning, though they have some."""

    number: int
    whole: bool
    answers: int
    unseen_reasoning: int

    def counted(self, before: ChatCounts) -> ChatCounts:
        """The counts of a source with this text, each chat once."""
        return ChatCounts(
            kept_whole=before.kept_whole + self.whole,
            split=before.split + (self.number == 0 and not self.whole),
            answers=before.answers + self.answers,
            unseen_reasoning=before.unseen_reasoning + self.unseen_reasoning,
        )


@dataclass(frozen=True, slots=True)
class Document:
    """A text. `counted` are the character spans whose tokens count in the loss, None for all of it; `lexer` names the Pygments
    lexer of its keywords; `complete` says that the text brings its own special tokens (a rendered chat), `ended` that it ends as
    the model would end it; the first `prefix` characters stand in front of each window of a text that is cut; `spelled` are the
    spans that look like special tokens and are text; `task` what it asks for; `prose_keywords` whether connectives and predicates
    are keywords."""

    text: str
    counted: tuple[tuple[int, int], ...] | None = None
    lexer: str | None = None
    complete: bool = False
    ended: bool = False
    prefix: int = 0
    spelled: tuple[tuple[int, int], ...] = ()
    chat: ChatPart | None = None
    task: Task | None = None
    prose_keywords: bool = False

    @property
    def prompt_end(self) -> int:
        """Characters before the first that counts; of plain text, none."""
        return self.counted[0][0] if self.counted else 0
