"""What a filter of documents is: a pure function of one tokenised document, so that any process may ask it."""

from abc import ABC, abstractmethod

from signal_store.errors import InputError
from teacher_cache.corpus.tokens import TokenizedDocument


class DocumentFilter(ABC):
    """Keeps a document, or says why not. What falls is counted with its source, and stops the plan where `on_bad_row` says so."""

    @abstractmethod
    def refusal(self, document: TokenizedDocument) -> InputError | None:
        """Why the document is left out; None where it stays."""
