"""Documents of a source, in a fixed order, wherever it lies: a folder, JSONL, Parquet, or anything `datasets` loads.

A row that is to blame itself (no JSON, no UTF-8, a column that is missing, a chat that the template refuses, an empty answer) stops
the reading, or is skipped and counted, as the source's `on_bad_row` says. What the recipe is to blame for always stops it.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pygments.lexers import find_lexer_class_for_filename
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError
from signal_store.manifest import SkippedRow
from teacher_cache.corpus.chat import ChatOptions, render_chat
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.files import plain_name
from teacher_cache.corpus.rows import Row, rows
from teacher_cache.corpus.special_text import Span, special_text
from teacher_cache.recipe import Source

MOST_LISTED = 20
"""Skipped rows that are listed; the others are counted."""


@dataclass(slots=True)
class Skips:
    """Rows of a source that were left out: how many, and the first of them. The first `known` are another's and not counted."""

    known: int = 0
    count: int = 0
    listed: list[SkippedRow] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """Each listed row in one line: where it stands on this machine, and what is wrong with it."""

    def add(self, row: int, error: InputError) -> None:
        """Leave out a row."""
        if self.known:
            self.known -= 1
            return
        self.count += 1
        self.tell(row, error)

    def tell(self, row: int, error: InputError) -> None:
        """List what is left out, if there is room."""
        if len(self.listed) < MOST_LISTED:
            self.listed.append(SkippedRow(row=row, reason=error.what))
            self.lines.append(str(error).removeprefix(f"[{error.kind}] "))


class SourceReader:
    """A source that is read once: some documents first, then what is left as rows."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerFast, known_skips: int = 0) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.skips = Skips(known_skips)
        self._rows = rows(source)
        self._ready: deque[Row] = deque()

    def rows(self) -> Iterator[Row]:
        """Rows of all that was not taken."""
        while True:
            row = self._ready.popleft() if self._ready else next(self._rows, None)
            if row is None:
                return
            yield row

    def documents(self) -> Iterator[Document]:
        """Documents one by one; whoever stops leaves the others where they are."""
        for row in self._made():
            assert isinstance(row.content, Document)
            yield row.content

    def _made(self) -> Iterator[Row]:
        """Rows whose content is a document."""
        for row in self.rows():
            try:
                made = documents_of(row, self.source, self.tokenizer)
            except InputError as error:
                if self.source.on_bad_row == "stop":
                    raise
                self.skips.add(row.number, error)
                continue
            self._ready.extendleft(replace(row, content=document) for document in reversed(made))
            for _ in made:
                yield self._ready.popleft()

    def has_more(self) -> bool:
        """Whether there is another document, which stays where it is."""
        row = next(self._made(), None)
        if row is None:
            return False
        self._ready.appendleft(row)
        return True


def documents(source: Source, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    """All documents of a source (empty ones too), up to `max_documents`."""
    return islice(SourceReader(source, tokenizer).documents(), source.max_documents)


def documents_of(row: Row, source: Source, tokenizer: PreTrainedTokenizerFast) -> tuple[Document, ...]:
    """The documents of one row. InputError, which names the row, for what that alone is to blame for."""
    if isinstance(row.content, Document):
        return (row.content,)
    lexer = source.lexer or (_lexer_for(row.where) if source.folder is not None else None)
    prose_keywords = source.tagger is not None and source.tagger.keywords and lexer is None
    try:
        made = _documents(_values(row), source, tokenizer, row.where) if source.folder is None else (_file_text(row),)
        for document in made:
            _refuse_unusable(document, row.where)
        spelled = [_spelled(document, source, tokenizer) for document in made]
    except InputError as error:
        error.where = error.where or row.where
        raise
    return tuple(
        replace(document, lexer=lexer, prose_keywords=prose_keywords, spelled=spans)
        for document, spans in zip(made, spelled, strict=True)
    )


def _spelled(document: Document, source: Source, tokenizer: PreTrainedTokenizerFast) -> tuple[Span, ...]:
    """Special tokens that a plain text spells and that are text; a chat knows its own. InputError where the others cannot be told
    from them."""
    special, own = special_text(tokenizer), document.complete or source.special_tokens == "tokens"
    spans = document.spelled if own else special.spelled(document.text)
    if spans:
        special.marker(document.text)
    return spans


def _refuse_unusable(document: Document, where: str) -> None:
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise InputError("a text is not Unicode", found="a lone surrogate", where=where) from error
    if document.counted is not None and not any(end > start for start, end in document.counted):
        raise InputError("an answer is empty", expected="some text", where=where, remedy="Leave out rows that nobody answered.")


def _content(row: Row) -> bytes | Mapping[str, Any]:
    if isinstance(row.content, InputError):
        raise row.content
    assert not isinstance(row.content, Document)
    return row.content


def _file_text(row: Row) -> Document:
    content = _content(row)
    assert isinstance(content, bytes)
    try:
        return Document(content.decode("utf-8"))  # line ends as they are: byte ends count in the file
    except UnicodeDecodeError as error:
        remedy = "Narrow the source's pattern or convert the file."
        raise InputError("a file is not UTF-8 text", found=error.reason, where=row.where, remedy=remedy) from error


def _lexer_for(path: str) -> str | None:
    lexer = find_lexer_class_for_filename(plain_name(Path(path)))
    return lexer.aliases[0] if lexer is not None and lexer.aliases else None


def _values(row: Row) -> Mapping[str, Any]:
    content = _content(row)
    if not isinstance(content, bytes):
        return content
    try:
        values = json.loads(content)
    except UnicodeDecodeError as error:
        raise InputError("a line is not UTF-8", found=error.reason, where=row.where) from error
    except (ValueError, RecursionError) as error:
        raise InputError("a line is not JSON", found=error, where=row.where) from error
    if not isinstance(values, dict):
        raise InputError("a line is not an object", expected="{...}", found=type(values).__name__, where=row.where)
    return values


def _documents(row: Mapping[str, Any], source: Source, tokenizer: PreTrainedTokenizerFast, where: str) -> tuple[Document, ...]:
    """What a row of columns says: one document, or one for each answer of a chat that is no single text."""
    if source.messages is not None:
        messages, tools = _column(row, source.messages, where, list), _tools(row, source, where)
        options = ChatOptions(source.chat_template, special_tokens=source.special_tokens == "tokens")
        found = render_chat(tokenizer, messages, tools, where=where, options=options)
        return tuple(replace(document, task=source.task) for document in found)
    return (_text(row, source, where),)


def _text(row: Mapping[str, Any], source: Source, where: str) -> Document:
    if source.prompt is not None and source.completion is not None:
        prompt, completion = (_column(row, name, where, str) for name in (source.prompt, source.completion))
        return Document(prompt + completion, ((len(prompt), len(prompt) + len(completion)),), source.lexer, task=source.task)
    return Document(_column(row, source.text or "text", where, str), lexer=source.lexer)


def _tools(row: Mapping[str, Any], source: Source, where: str) -> Any:
    if source.tools is None:
        return None
    if source.tools not in row:
        raise InputError("no such column", expected=source.tools, found=", ".join(map(str, row)), where=where)
    return row[source.tools]


def _column(row: Mapping[str, Any], name: str, where: str, kind: type) -> Any:
    if name not in row:
        raise InputError("no such column", expected=name, found=", ".join(map(str, row)), where=where)
    if not isinstance(row[name], kind):
        raise InputError(f"column {name} has another type", expected=kind.__name__, found=type(row[name]).__name__, where=where)
    return row[name]
