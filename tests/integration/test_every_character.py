"""A text that leaves no character to mark special tokens with."""

from pathlib import Path

import pytest

from signal_store.errors import InputError
from teacher_cache.corpus.chat import render_chat
from teacher_cache.corpus.sources import SourceReader
from teacher_cache.recipe import Source
from tests.tiny import make_tokenizer, write_jsonl


def test_a_text_of_every_character_is_a_bad_row(tmp_path: Path) -> None:
    every = "".join(map(chr, range(0xF0000, 0x110000)))
    path = write_jsonl(tmp_path / "t.jsonl", ["a", every + "<|end|>", every, "b"])
    for source in (Source(name="s", jsonl=path), Source(name="s", jsonl=path, on_bad_row="skip")):
        reader = SourceReader(source, make_tokenizer())
        if source.on_bad_row == "stop":
            with pytest.raises(InputError, match=r"no character to mark .* in .*t\.jsonl:2"):
                list(reader.documents())
        else:
            assert [document.text for document in reader.documents()] == ["a", every, "b"]
            assert [row.row for row in reader.skips.listed] == [2]
    chat = [{"role": "user", "content": every}, {"role": "assistant", "content": "a"}]
    with pytest.raises(InputError, match="too many different characters"):
        render_chat(make_tokenizer(), chat, where="t.jsonl:1")
