"""Where texts come from: lists, folders and patterns of files, compressed or not; rows that cannot be read; work in processes."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError, NotFoundError
from teacher_cache.corpus.sources import SourceReader, documents
from teacher_cache.recipe import Source
from tests.tiny import PROSE, write_jsonl


def zstd(data: bytes) -> bytes:
    half = len(data) // 2
    return b"".join(bytes(pa.Codec("zstd").compress(part, asbytes=True)) for part in (data[:half], data[half:]))  # two frames


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd, "xz": lzma.compress, "bz2": bz2.compress}


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(source: Source, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [document.text for document in documents(source, tokenizer)]


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("named", [True, False])
def test_compressed_files_are_read_whatever_their_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str, named: bool
) -> None:
    press, end = COMPRESSIONS[kind], f".{kind}" if named else ""
    (tmp_path / f"a.jsonl{end}").write_bytes(press(lines(*PROSE)))
    assert read(Source(name="s", jsonl=tmp_path / f"a.jsonl{end}"), tokenizer) == PROSE
    table = io.BytesIO()
    pq.write_table(pa.table({"text": PROSE}), table)
    (tmp_path / f"a.parquet{end}").write_bytes(press(table.getvalue()))
    assert read(Source(name="s", parquet=tmp_path / f"a.parquet{end}"), tokenizer) == PROSE
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"a.py{end}").write_bytes(press(b"x = 1\r\n"))
    (found,) = documents(Source(name="s", folder=tmp_path / "folder"), tokenizer)
    assert (found.text, found.lexer) == ("x = 1\r\n", "python")


def test_a_list_a_folder_and_a_pattern(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "data" / "b").mkdir(parents=True)
    (tmp_path / "data" / "README.md").write_text("not read")
    for name, text in (("z.jsonl", "z"), ("a.jsonl.gz", "a"), ("b/c.ndjson", "c")):
        data = lines(text)
        (tmp_path / "data" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    folder = tmp_path / "data"
    assert read(Source(name="s", jsonl=folder), tokenizer) == ["a", "c", "z"]
    assert read(Source(name="s", jsonl=folder / "*.jsonl*"), tokenizer) == ["a", "z"]
    assert read(Source(name="s", jsonl=folder / "**" / "*son*"), tokenizer) == ["a", "c", "z"]
    assert read(Source(name="s", jsonl=[folder / "z.jsonl", folder / "b"]), tokenizer) == ["z", "c"]  # a list has its own order
    odd = write_jsonl(tmp_path / "odd[1].jsonl", ["odd"])
    assert read(Source(name="s", jsonl=odd), tokenizer) == ["odd"]
    for place, words in (
        (folder / "*.json", ["no file matches", "*.json"]),
        (tmp_path / "none.jsonl", ["no such file", "none.jsonl"]),
        ([folder / "z.jsonl", folder / "z*"], ["named twice", "z.jsonl"]),
    ):
        with pytest.raises((InputError, NotFoundError)) as caught:
            read(Source(name="s", jsonl=place), tokenizer)
        assert all(word in str(caught.value) for word in [*words, "source s"])
    with pytest.raises(InputError, match="holds no such file"):
        read(Source(name="s", parquet=folder), tokenizer)
    with pytest.raises(ValidationError, match="at least one"):
        Source(name="s", jsonl=[])


def archives() -> dict[str, bytes]:
    packed, rolled, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.jsonl", lines("a"))
    with tarfile.open(fileobj=rolled, mode="w:gz") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"a"))
    pq.write_table(pa.table({"text": ["a"]}), table)
    return {
        "a zip archive": packed.getvalue(),
        "a tar archive": rolled.getvalue(),
        "a Parquet file": table.getvalue(),
        "UTF-16": '{"text": "a"}'.encode("utf-16"),
    }


@pytest.mark.parametrize("kind", archives())
def test_what_is_no_text_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "a.jsonl"
    file.write_bytes(archives()[kind])
    for source in (Source(name="s", jsonl=file), Source(name="s", folder=file.parent)):
        with pytest.raises(InputError, match=kind) as caught:
            read(source, tokenizer)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_damaged_compressed_file_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(COMPRESSIONS[kind](os.urandom(4096).hex().encode())[:-20])
    for source in (Source(name="s", jsonl=file), Source(name="s", parquet=file)):
        with pytest.raises(InputError, match="compressed file is damaged") as caught:
            read(source, tokenizer)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_streams_after_the_first_are_read_or_the_file_is_damaged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    file, press = tmp_path / "a.jsonl", COMPRESSIONS[kind]
    later = press(lines(*PROSE[1:]))
    file.write_bytes(press(lines(PROSE[0])) + later + (bytes(8) if kind in ("xz", "gz") else b""))
    assert read(Source(name="s", jsonl=file), tokenizer) == PROSE
    for damaged in (b"\x00" * 2 + later[2:], b"garbage", later[:-1], b"X" + later[1:]):
        file.write_bytes(press(lines(PROSE[0])) + damaged)
        with pytest.raises(InputError, match="compressed file is damaged"):
            read(Source(name="s", jsonl=file), tokenizer)


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*PROSE))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for place in ({"folder": tmp_path}, {"jsonl": tmp_path}, {"jsonl": tmp_path / "*.jsonl"}):
        with pytest.raises(NotFoundError, match=r"a link leads nowhere; found .*b\.jsonl"):
            read(Source(name="s", **place), tokenizer)


def test_two_columns_of_one_name_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text", "body"]), tmp_path / "a.parquet")
    assert read(Source(name="s", parquet=tmp_path / "a.parquet", text="body"), tokenizer) == ["c"]
    with pytest.raises(InputError, match="two columns have one name"):
        read(Source(name="s", parquet=tmp_path / "a.parquet"), tokenizer)


def not_utf8(values: list[bytes]) -> pa.Array:
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_parquet_that_is_not_utf8(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "bad": not_utf8([b"a", b"\xff", b"c"])}), file)
    assert read(Source(name="s", parquet=file), tokenizer) == ["a", "b", "c"]
    assert read(Source(name="s", dataset={"path": "parquet", "data_files": str(file)}), tokenizer) == ["a", "b", "c"]
    with pytest.raises(InputError, match="column bad is not UTF-8") as caught:
        read(Source(name="s", parquet=file, text="bad"), tokenizer)
    assert f"{file}:2" in str(caught.value)
    assert read(Source(name="s", parquet=file, text="bad", on_bad_row="skip"), tokenizer) == ["a", "c"]
    with pytest.raises(InputError, match="no such column"):  # the file's fault, not a row's
        read(Source(name="s", parquet=file, text="txt", on_bad_row="skip"), tokenizer)


BAD_ROWS: dict[str, tuple[dict[str, Any], bytes]] = {
    "is not JSON": ({}, b"{text"),
    "is not UTF-8": ({}, b'{"text": "\xff"}'),
    "is not an object": ({}, b"[1]"),
    "no such column": ({}, b'{"body": "a"}'),
    "has another type": ({}, b'{"text": null}'),
    "is not Unicode": ({}, rb'{"text": "\ud800"}'),
    "an answer is empty": ({"prompt": "text", "completion": "answer"}, b'{"text": "a", "answer": ""}'),
    "no answer": ({"messages": "chat"}, b'{"chat": [{"role": "user", "content": "a"}]}'),
    "not a chat": ({"messages": "chat"}, b'{"chat": ["a"]}'),
}


@pytest.mark.parametrize("words", BAD_ROWS)
def test_a_bad_row_stops_or_is_skipped_and_listed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, words: str) -> None:
    columns, bad = BAD_ROWS[words]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = json.dumps({"text": "a", "answer": "b", "chat": turns}).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([good, b"", bad, good, bad, good]) + b"\n")
    with pytest.raises(InputError, match=words) as caught:
        read(Source(name="s", jsonl=file, **columns), tokenizer)
    assert f"{file}:3" in str(caught.value)
    assert "\n" not in str(caught.value)
    reader = SourceReader(Source(name="s", jsonl=file, on_bad_row="skip", **columns), tokenizer)
    assert len(list(reader.documents())) == 3
    assert reader.skips.count == 2
    assert [skipped.row for skipped in reader.skips.listed] == [2, 4]
    assert all(words in skipped.reason for skipped in reader.skips.listed)
    assert f"{file}:5" in reader.skips.lines[1]


def test_a_chat_that_the_template_refuses_names_its_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    strict = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    strict.chat_template = "{{ raise_exception('roles must take turns') }}"
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")
    with pytest.raises(InputError, match="take turns") as caught:
        read(Source(name="s", jsonl=file, messages="messages"), strict)
    assert f"{file}:1" in str(caught.value)


def test_a_file_of_a_folder_that_is_no_text_can_be_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_bytes(archives()["a zip archive"])
    with pytest.raises(InputError, match="not UTF-8"):
        read(Source(name="s", folder=tmp_path), tokenizer)
    assert read(Source(name="s", folder=tmp_path, on_bad_row="skip"), tokenizer) == ["a"]


def test_a_reader_gives_the_rest_where_documents_stopped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    reader = SourceReader(Source(name="s", jsonl=write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"])), tokenizer)
    assert next(reader.documents()).text == "a"
    assert reader.has_more()
    assert [row.number for row in reader.rows()] == [2, 3]  # b, which was looked at, is a document by now
    assert not reader.has_more()
