"""Rows of a source, in order, wherever they lie: a folder's files, lines of JSONL, rows of Parquet or of what `datasets` loads.

Only the columns that are needed are read. What a row alone is to blame for comes as the row's content; what stops the reading of a
whole file or source is raised.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from signal_store.errors import InputError, NotFoundError
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.files import HEAD_BYTES, compression_of, decompressed, opened, source_files
from teacher_cache.recipe import Source

PARQUET_ROWS = 1024

Content = bytes | Mapping[str, Any] | InputError | Document
Found = tuple[str, Content, int]
"""Where a row stands, its content and about how many bytes that is."""


@dataclass(frozen=True, slots=True)
class Row:
    """Row `number` (from 1) of a source: undecoded bytes of a file or line, columns by name, the error that it is, or a document
    that was made of it before. `size` is about its bytes; `where` names the file and its line, or the row."""

    number: int
    where: str
    content: Content
    size: int


def rows(source: Source) -> Iterator[Row]:
    """All rows of a source. Its files are looked for now, before the first is read."""
    if source.dataset is not None:
        found = _dataset_rows(source)
    else:
        files = source_files(source)
        found = chain.from_iterable(_file_rows(path, source) for path in files)
    return (Row(number, *parts) for number, parts in enumerate(found, start=1))


def columns_of(source: Source) -> tuple[str, ...]:
    """The columns that each row of a table must have."""
    if source.messages is not None:
        return (source.messages,) if source.tools is None else (source.messages, source.tools)
    if source.prompt is not None and source.completion is not None:
        return (source.prompt, source.completion)
    return (source.text or "text",)


def _file_rows(path: Path, source: Source) -> Iterator[Found]:
    if source.folder is not None:
        return _text_file(path)
    return _lines(path) if source.jsonl is not None else _parquet_rows(path, source)


def _text_file(path: Path) -> Iterator[Found]:
    try:
        with opened(path) as file:
            content = file.read()
    except InputError as error:
        yield str(path), error, HEAD_BYTES
        return
    yield str(path), content, len(content)


def _lines(path: Path) -> Iterator[Found]:
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", line, len(line)


def _parquet_rows(path: Path, source: Source) -> Iterator[Found]:
    number = 0
    try:
        with _at_any_place(path) as content, pq.ParquetFile(content) as file:
            there = file.schema_arrow.names
            if missing := [name for name in columns_of(source) if name not in there]:
                raise InputError("no such column", expected=", ".join(missing), found=", ".join(there), where=path)
            if twice := [name for name in columns_of(source) if there.count(name) > 1]:
                raise InputError("two columns have one name", expected="one", found=twice[0], where=path)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(columns_of(source))):
                size = batch.nbytes // max(1, batch.num_rows)
                for values in _values(batch, path, number + 1):
                    number += 1
                    yield f"{path}:{number}", values, size
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError("not a Parquet file", found=error, where=path) from error


@contextlib.contextmanager
def _at_any_place(path: Path) -> Iterator[Path | IO[bytes]]:
    """A file that can be read at any place: itself, or what it holds decompressed, in a temporary file."""
    with path.open("rb") as file:
        is_plain = compression_of(file.peek(HEAD_BYTES)) is None
    if is_plain:
        yield path
        return
    with tempfile.TemporaryFile() as whole:
        with decompressed(path) as content:
            copyfileobj(content, whole)
        whole.seek(0)
        yield whole


def _values(batch: pa.RecordBatch, path: Path, first: int) -> list[Content]:
    try:
        whole: list[Content] = batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check what a file says of its strings
        return [_value(batch.slice(i, 1), f"{path}:{first + i}") for i in range(batch.num_rows)]
    return whole


def _value(row: pa.RecordBatch, where: str) -> Content:
    found = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            found[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return InputError(f"column {name} is not UTF-8", found=error.reason, where=where)
    return found


def _dataset_rows(source: Source) -> Iterator[Found]:
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
        for number, row in enumerate(_needed(table, source), start=1):
            yield f"source {source.name}, row {number}", row, sum(len(str(value)) for value in row.values())
    except (OSError, ValueError, ConnectionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotFoundError(
            "cannot load the data set", found=f"{reference.path}: {reason}", where=f"source {source.name}"
        ) from error


def _needed(table: Any, source: Source) -> Any:
    """A table of `datasets`, without columns that nobody reads, where it knows its columns."""
    needed = columns_of(source)
    return table.select_columns(list(needed)) if set(needed) <= set(table.column_names or ()) else table
