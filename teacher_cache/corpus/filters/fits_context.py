"""Documents that the context has no room for: chats that must not be cut, and system turns that every window would repeat."""

from dataclasses import dataclass

from signal_store.errors import InputError
from teacher_cache.corpus.filters.base import DocumentFilter
from teacher_cache.corpus.tokens import TokenizedDocument

REMEDY = "Raise context, or leave such chats out."


@dataclass(frozen=True, slots=True)
class FitsContext(DocumentFilter):
    """`context` in tokens; with `refuse_long`, no document may be longer; without, no prefix may take more than half of it."""

    context: int
    refuse_long: bool

    def refusal(self, document: TokenizedDocument) -> InputError | None:
        """See `DocumentFilter`."""
        total = len(document.input_ids)
        if total <= self.context:
            return None
        if self.refuse_long:
            expected = f"at most {self.context} tokens"
            return InputError("a chat is longer than the context", expected=expected, found=total, remedy=REMEDY)
        if 2 * document.prefix > self.context:
            return InputError(
                "a system turn takes more than half of the context",
                expected=f"at most {self.context // 2} tokens",
                found=document.prefix,
                remedy=REMEDY,
            )
        return None
