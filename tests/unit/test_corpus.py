"""From texts to segments: keywords, chats, prompts, bytes, cuts."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer, tokenizer_digest
from signal_store.errors import InputError
from signal_store.format.text import NO_TOKEN
from signal_store.signals import DEFAULT_KEYWORDS
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.keywords import keyword_spans
from teacher_cache.corpus.segments import cut
from teacher_cache.corpus.sources import documents
from teacher_cache.corpus.tokens import NONE, TokenizedDocument, tokenize
from teacher_cache.recipe import Source
from tests.tiny import CODE, PROSE, make_tokenizer

KEYWORDS = frozenset(DEFAULT_KEYWORDS)


def test_keywords_are_found_by_the_lexer() -> None:
    text = 'def undefined():\r\n    s = "if for"  # while\n    return [x for x in s if x\n'  # broken code
    found = [text[a:b] for a, b in keyword_spans(text, "python", KEYWORDS)]
    assert found == ["def", "return", "for", "if"]


def test_keyword_tokens_hold_the_keywords_last_character(tokenizer: PreTrainedTokenizerFast) -> None:
    (found,) = tokenize([Document(CODE[0], lexer="python")], tokenizer, append_eos=True, keywords=KEYWORDS)
    words = [str(tokenizer.decode([i])).strip() for i in found.input_ids[found.keyword]]
    assert len(words) == 4
    assert all(full.endswith(word) for full, word in zip(["def", "return", "for", "if"], words, strict=True))


def test_prompt_is_context_and_completion_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "One plus one is ", "a": "two"}) + "\n")
    source = Source(name="s", jsonl=path, prompt="q", completion="a")
    (found,) = tokenize(documents(source, tokenizer), tokenizer, append_eos=True, keywords=frozenset())
    assert tokenizer.decode(found.input_ids[found.counts]) == "two<|end|>"


def test_folder_and_parquet_and_datasets_give_the_same_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = sorted(CODE)
    folder = tmp_path / "code"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.py").write_text(text)
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    reference = {"path": "json", "data_files": str(tmp_path / "t.jsonl")}
    sources = [
        Source(name="folder", folder=folder, pattern="*.py"),
        Source(name="parquet", parquet=tmp_path / "t.parquet"),
        Source(name="dataset", dataset=reference),
    ]
    for source in sources:
        assert [d.text for d in documents(source, tokenizer)] == texts
    assert next(iter(documents(sources[0], tokenizer))).lexer == "python"


@pytest.mark.parametrize("row", ["not json", "[1]", '{"other": "x"}', '{"text": 3}'])
def test_bad_rows_are_refused_in_one_line(tmp_path: Path, row: str, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(InputError) as caught:
        list(documents(Source(name="s", jsonl=path), tokenizer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [*PROSE, "tabs\tand\r\nlines", "emoji 🙂 end"])
def test_byte_end_counts_the_documents_utf8(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    (found,) = tokenize([Document(text)], tokenizer, append_eos=True, keywords=frozenset())
    assert found.byte_end[-1] == len(text.encode())
    assert (np.diff(found.byte_end.astype(int)) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 90),
    context=st.integers(2, 20),
    overlap=st.integers(0, 12),
    prefix=st.integers(0, 10),
    closed=st.booleans(),
    data=st.data(),
)
def test_segments_cover_every_token_once(
    total: int, context: int, overlap: int, prefix: int, closed: bool, data: st.DataObject
) -> None:
    overlap, prefix = min(overlap, context - 1), min(prefix, context // 2, total)
    counts = np.asarray(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    ids = np.arange(1, total + 1, dtype=np.uint32)
    document = TokenizedDocument(ids, ids, counts, counts, np.zeros((total, 0), np.uint8), closed, prefix, NONE, NONE)
    segments = list(cut(document, context, overlap, source=0, number=3))
    own = np.concatenate([s.input_ids[s.context_only :] for s in segments])
    assert (own == ids).all()
    assert all(len(s) <= context for s in segments)
    mask = np.concatenate([s.loss_mask[s.context_only :] for s in segments])
    assert (mask[:-1] == counts[1:]).all()
    assert mask[-1] == (2 if counts[-1] and not closed else 0)
    for s, following in zip(segments, [*segments[1:], None], strict=True):
        assert s.next_token == (NO_TOKEN if following is None else following.input_ids[following.context_only])
        assert (s.loss_mask[: s.context_only] == 0).all()
        assert (s.input_ids[:prefix] == ids[:prefix]).all()
        assert not s.keyword[: s.context_only].any()


def test_a_tokenizers_old_truncation_and_padding_are_dropped(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.decode(loaded.backend_tokenizer.encode(PROSE[0]).ids) == PROSE[0]
    assert tokenizer_digest(loaded) == tokenizer_digest(make_tokenizer())
