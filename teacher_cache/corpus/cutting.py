"""What plan does to the rows of a source, each for itself: render, tokenise, tag, cut.

A pure function of rows, recipe and tokenizer, so that any process may do it. Imports no torch, for the sake of processes that do
nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError, SignalStoreError
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.filters import DocumentFilter, filters_of
from teacher_cache.corpus.roles import Tagger, make_tagger, no_words, token_roles
from teacher_cache.corpus.rows import Row
from teacher_cache.corpus.segments import PlannedSegment, cut
from teacher_cache.corpus.sources import documents_of
from teacher_cache.corpus.tokens import TokenizedDocument, tokenize
from teacher_cache.recipe import CacheRecipe, Source


@dataclass(frozen=True, slots=True)
class Job:
    """Some rows of source `number`, in order; `failure` is what stopped the reading after them."""

    source: Source
    number: int
    rows: Sequence[Row]
    failure: SignalStoreError | None = None


@dataclass(frozen=True, slots=True)
class CutDocument:
    """A document, and its segments, which do not know its number yet."""

    text: Document
    segments: Sequence[PlannedSegment]

    @property
    def is_empty(self) -> bool:
        """Whether it has no text, or none that the tokenizer keeps."""
        return not self.segments


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that gives no document, and why; or a document of it, `text`, that a filter left out."""

    number: int
    error: InputError
    text: Document | None = None


Outcome = CutDocument | BadRow


@dataclass(slots=True)
class Cutter:
    """Cuts rows as a recipe says. `words`: taggers by the name of their source; those that lack are loaded when they are needed."""

    recipe: CacheRecipe
    tokenizer: PreTrainedTokenizerFast
    words: dict[str, Tagger] = field(default_factory=dict)

    def cut(self, job: Job) -> list[Outcome]:
        """What becomes of each row, in order; where bad rows stop the plan, the first is the last outcome."""
        found: list[tuple[Row, Document | BadRow]] = []
        for row in job.rows:
            try:
                found += [(row, document) for document in documents_of(row, job.source, self.tokenizer)]
            except InputError as error:
                found.append((row, BadRow(row.number, error)))
                if job.source.on_bad_row == "stop":
                    break
        tokenized = self._tokenized([d for _, d in found if isinstance(d, Document) and d.text], job.source)
        filters = filters_of(job.source, self.recipe)
        return [item if isinstance(item, BadRow) else self._segments(row, item, tokenized, job, filters) for row, item in found]

    def _tokenized(self, texts: Sequence[Document], source: Source) -> Iterator[TokenizedDocument]:
        return tokenize(
            texts,
            self.tokenizer,
            append_eos=self.recipe.append_eos,
            keywords=frozenset(self.recipe.keywords),
            roles_of=partial(token_roles, self._tagger(source)) if self.recipe.has_tags else None,
        )

    def _segments(
        self,
        row: Row,
        document: Document,
        tokenized: Iterator[TokenizedDocument],
        job: Job,
        filters: Sequence[DocumentFilter],
    ) -> Outcome:
        if not document.text:
            return CutDocument(document, ())
        whole = next(tokenized)  # an error here is no row's: a lexer that is not there, a tokenizer that cannot
        for each in filters:
            if (error := each.refusal(whole)) is not None:
                error.where = row.where
                return BadRow(row.number, error, document)
        return CutDocument(document, tuple(cut(whole, self.recipe.context, self.recipe.overlap, job.number, 0)))

    def _tagger(self, source: Source) -> Tagger:
        if source.name not in self.words:
            self.words[source.name] = no_words if source.tagger is None else make_tagger(source.tagger)[0]
        return self.words[source.name]

    def elsewhere(self) -> "Cutter":
        """The same for another process, which loads its own taggers."""
        return Cutter(self.recipe, self.tokenizer)
