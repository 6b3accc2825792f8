"""Documents of a source, in a fixed order, wherever it lies: a folder, JSONL, Parquet, or anything `datasets` loads."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pygments.lexers import find_lexer_class_for_filename
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError, NotFoundError
from teacher_cache.corpus.chat import ChatOptions, render_chat
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.special_text import special_text
from teacher_cache.recipe import Source


def documents(source: Source, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    """All documents of a source (empty ones too), up to `max_documents`."""
    found = _files(source) if source.folder is not None else _table(source, tokenizer)
    prose_keywords = source.tagger is not None and source.tagger.keywords
    for number, document in enumerate(islice(found, source.max_documents)):
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            where = f"source {source.name}, document {number}"
            raise InputError("a text is not Unicode", found="a lone surrogate", where=where) from error
        if not document.complete and source.special_tokens == "text":
            document = replace(document, spelled=special_text(tokenizer).spelled(document.text))
        yield replace(document, prose_keywords=True) if prose_keywords and document.lexer is None else document


def _files(source: Source) -> Iterator[Document]:
    assert source.folder is not None
    if not source.folder.is_dir():
        raise NotFoundError("no such folder", found=source.folder, where=f"source {source.name}")
    try:
        paths = sorted(p for p in source.folder.glob(source.pattern) if p.is_file())
    except (ValueError, NotImplementedError) as error:
        raise InputError("not a pattern of files", found=f"{source.pattern}: {error}", where=f"source {source.name}") from error
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")  # line ends as they are: byte ends count in the file
        except UnicodeDecodeError as error:
            raise InputError(
                "a file is not UTF-8 text",
                found=error.reason,
                where=path,
                remedy="Narrow the source's pattern or convert the file.",
            ) from error
        yield Document(text, lexer=source.lexer or _lexer_for(path))


def _lexer_for(path: Path) -> str | None:
    lexer = find_lexer_class_for_filename(path.name)
    return lexer.aliases[0] if lexer is not None and lexer.aliases else None


def _rows(source: Source) -> Iterator[Mapping[str, Any]]:
    if source.jsonl is not None:
        return _jsonl_rows(source.jsonl, source.name)
    if source.parquet is not None:
        return _parquet_rows(source.parquet, source.name)
    return _dataset_rows(source)


def _jsonl_rows(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise NotFoundError("no such file", found=path, where=f"source {name}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)  # also refuses what is not UTF-8
            except (ValueError, RecursionError) as error:
                raise InputError("a line is not JSON", found=error, where=f"{path}:{number}") from error
            if not isinstance(row, dict):
                raise InputError("a line is not an object", expected="{...}", found=type(row).__name__, where=f"{path}:{number}")
            yield row


def _parquet_rows(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise NotFoundError("no such file", found=path, where=f"source {name}")
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError("not a Parquet file", found=error, where=path) from error


def _dataset_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    reference = source.dataset
    assert reference is not None
    try:
        table = load_dataset(
            reference.path,
            reference.name,
            split=reference.split,
            data_files=list(reference.data_files) if isinstance(reference.data_files, tuple) else reference.data_files,
            revision=reference.revision,
            streaming=True,
        )
        yield from table
    except (OSError, ValueError, ConnectionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotFoundError(
            "cannot load the data set", found=f"{reference.path}: {reason}", where=f"source {source.name}"
        ) from error


def _table(source: Source, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    for number, row in enumerate(_rows(source)):
        yield from _documents(row, source, tokenizer, where=f"source {source.name}, document {number}")


def _documents(row: Mapping[str, Any], source: Source, tokenizer: PreTrainedTokenizerFast, where: str) -> tuple[Document, ...]:
    """What a row says: one document, or one for each answer of a chat that is no single text."""
    if source.messages is not None:
        messages, tools = _column(row, source.messages, where, list), _tools(row, source, where)
        options = ChatOptions(source.chat_template, special_tokens=source.special_tokens == "tokens")
        found = render_chat(tokenizer, messages, tools, where=where, options=options)
        return tuple(replace(document, lexer=source.lexer, task=source.task) for document in found)
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
