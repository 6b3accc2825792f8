"""The files of a source, in a fixed order, and their bytes, decompressed.

How a file is compressed is told by its first bytes, never by its name. What is no text (an archive, UTF-16) is refused by name.
"""

import bz2
import contextlib
import glob
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from signal_store.errors import InputError, NotFoundError
from teacher_cache.recipe import Source

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
BUFFER_BYTES = 2**20
HEAD_BYTES = 512

_COMPRESSION = (
    (re.compile(rb"\x1f\x8b"), "gzip"),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "zstd"),
    (re.compile(rb"\xfd7zXZ\x00"), "xz"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "bz2"),
)
_NO_TEXT = (
    (re.compile(rb"PK\x03\x04"), "a zip archive"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive"),
    (re.compile(rb"Rar!\x1a"), "a rar archive"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive"),
    (re.compile(rb"\x04\x22\x4d\x18"), "an lz4 file"),
    (re.compile(rb"PAR1[\x00-\xff]{4}"), "a Parquet file"),
    (re.compile(rb"ARROW1\x00\x00"), "an Arrow file"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16 or UTF-32 text"),
)


def source_files(source: Source) -> list[Path]:
    """The files of a source that is a folder, JSONL or Parquet; NotFoundError or InputError where a place holds none."""
    if source.folder is not None:
        return _text_files(source)
    places, suffixes = (source.jsonl, JSONL_SUFFIXES) if source.jsonl is not None else (source.parquet, PARQUET_SUFFIXES)
    assert places is not None
    found = [path for place in places for path in _at(place, suffixes, source.name)]
    if twice := sorted({str(path) for path in found if found.count(path) > 1}) if len(places) > 1 else []:
        raise InputError("a file is named twice", expected="each once", found=twice[0], where=f"source {source.name}")
    return found


def _text_files(source: Source) -> list[Path]:
    assert source.folder is not None
    where = f"source {source.name}"
    if not source.folder.is_dir():
        raise NotFoundError("no such folder", found=source.folder, where=where)
    try:
        found = _only_files(source.folder.glob(source.pattern), where)
    except (ValueError, NotImplementedError) as error:
        raise InputError("not a pattern of files", found=f"{source.pattern}: {error}", where=where) from error
    if not found:
        raise InputError("no file matches", expected="one at least", found=source.folder / source.pattern, where=where)
    return found


def _at(place: Path, suffixes: Sequence[str], name: str) -> list[Path]:
    """The file at a place; or a folder's files of these names, or a pattern's, sorted."""
    where = f"source {name}"
    if place.is_file():
        return [place]
    if place.is_dir():
        found = _only_files((p for p in place.glob("**/*") if plain_name(p).lower().endswith(tuple(suffixes))), where)
        if not found:
            expected = " or ".join(suffixes) + ", compressed or not"
            raise InputError(
                "a folder holds no such file",
                expected=expected,
                found=place,
                where=where,
                remedy="Give a pattern of files instead.",
            )
        return found
    if not glob.has_magic(str(place)):
        raise NotFoundError("no such file", found=place, where=where)
    found = _only_files(map(Path, glob.glob(str(place), recursive=True)), where)  # noqa: PTH207
    if not found:
        raise InputError("no file matches", expected="one at least", found=place, where=where)
    return found


def _only_files(found: Iterable[Path], where: str) -> list[Path]:
    """Those that are files, sorted. NotFoundError for a link that leads nowhere: nobody knows what it stands for."""
    paths = sorted(found)
    if lost := [path for path in paths if not path.exists()]:
        raise NotFoundError("a link leads nowhere", found=lost[0], where=where, remedy="Repair it, or narrow the source's pattern.")
    return [path for path in paths if path.is_file()]


def plain_name(path: Path) -> str:
    """A file's name without what says that it is compressed."""
    return path.stem if path.suffix in COMPRESSED_SUFFIXES else path.name


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file of text, decompressed. InputError where they are an archive's or a table's."""
    with decompressed(path) as content:
        if kind := kind_of(content.peek(HEAD_BYTES)):
            raise InputError("a file is not UTF-8 text", expected="text, plain or as gzip, zstd, xz or bz2", found=kind, where=path)
        yield content


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed, whatever they are. InputError where the compression is damaged."""
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(path.open("rb"))
        kind = compression_of(plain.peek(HEAD_BYTES))
        if kind is None:
            yield plain
            return
        try:
            raw = stack.enter_context(_decompressor(plain, kind))
            yield stack.enter_context(io.BufferedReader(raw, BUFFER_BYTES))
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the decompressor's
                raise
            remedy = "Fetch or write the file again."
            raise InputError("a compressed file is damaged", found=f"{kind}: {error}", where=path, remedy=remedy) from error


def _decompressor(plain: IO[bytes], kind: str) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=plain)
    if kind == "zstd":
        return pa.CompressedInputStream(plain, "zstd")
    return _Streams(plain, lzma.LZMADecompressor if kind == "xz" else bz2.BZ2Decompressor)


class _Streams(io.RawIOBase):
    """One compressed stream after another, as parallel compressors write them. Python's own readers take the file to end where a
    later stream begins damaged; here that is an error."""

    def __init__(self, plain: IO[bytes], kind: Callable[[], Any]) -> None:
        super().__init__()
        self._plain, self._kind, self._stream = plain, kind, kind()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = b""
        while not found:
            given = b""
            if self._stream.eof:
                if not (given := self._next_stream()):
                    return 0
                self._stream = self._kind()
            elif self._stream.needs_input and not (given := self._plain.read(BUFFER_BYTES)):
                raise EOFError("ended before the end-of-stream marker was reached")
            found = self._stream.decompress(given, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _next_stream(self) -> bytes:
        """The first bytes of the stream after this one, or none; xz pads its streams with zeros."""
        rest: bytes = self._stream.unused_data.lstrip(b"\x00")
        while not rest and (block := self._plain.read(BUFFER_BYTES)):
            rest = block.lstrip(b"\x00")
        return rest


def compression_of(head: bytes) -> str | None:
    """What a file that begins so is compressed with."""
    return next((name for pattern, name in _COMPRESSION if pattern.match(head)), None)


def kind_of(head: bytes) -> str | None:
    """What a file that begins so is, where it is no UTF-8 text."""
    return next((name for pattern, name in _NO_TEXT if pattern.match(head)), None)
