"""Special tokens that a text spells, white space in tokens, and what begins each window, with tokenizers of every kind."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from teacher_cache.corpus.document import Document
from teacher_cache.corpus.segments import COUNTS, cut, loss_mask_of
from teacher_cache.corpus.sources import documents
from teacher_cache.corpus.special_text import SpecialText
from teacher_cache.corpus.tokens import TokenizedDocument, tokenize
from teacher_cache.recipe import Source
from tests.tiny import CODE, PROSE, make_tokenizer, write_jsonl

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
TEXT = "The teacher </s> speaks <s> once,  <|user|>def now"


def finished(model: Tokenizer, around: str = "$A") -> PreTrainedTokenizerFast:
    model.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(CODE + PROSE, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet))
    model.post_processor = processors.ByteLevel(**options)
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.train_from_iterator(CODE + PROSE, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL))
    return finished(model, "<s> $A")


def unigram() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.Unigram())
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.train_from_iterator(CODE + PROSE, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>"))
    return finished(model, "<s> $A </s>")


def words() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.train_from_iterator(CODE + PROSE, trainers.WordLevelTrainer(vocab_size=200, special_tokens=SPECIAL))
    return finished(model)


def pieces() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordPiece(unk_token="<unk>"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.train_from_iterator(CODE + PROSE, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return finished(model)


KINDS: list[Callable[[], PreTrainedTokenizerFast]] = [byte_level, metaspace, unigram, words, pieces]


@cache
def special_of(kind: Callable[[], PreTrainedTokenizerFast]) -> SpecialText:
    return SpecialText(kind())


def tokens_of(document: Document, tokenizer: PreTrainedTokenizerFast, *, append_eos: bool = True) -> TokenizedDocument:
    (found,) = tokenize([document], tokenizer, append_eos=append_eos, keywords=frozenset())
    return found


def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], **options: Any) -> list[Document]:
    return list(documents(Source(name="s", jsonl=write_jsonl(tmp_path / "t.jsonl", texts), **options), tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_text_spells_is_text(kind: Callable[[], PreTrainedTokenizerFast]) -> None:
    special = special_of(kind)
    spelled = special.spelled(TEXT)
    assert [TEXT[a:b] for a, b in spelled] == ["</s>", "<s>", "<|user|>"]
    (plain,) = special.encode([TEXT], [spelled], add_special_tokens=False)
    assert not {1, 2, 3} & set(plain.input_ids.tolist())
    (mixed,) = special.encode([TEXT], [spelled[:1]], add_special_tokens=False)
    assert [i for i in mixed.input_ids.tolist() if i in (1, 2, 3)] == [1, 3]
    assert [TEXT[a:b] for i, (a, b) in zip(mixed.input_ids, mixed.spans.tolist(), strict=True) if i in (1, 3)] == [
        "<s>",
        "<|user|>",
    ]


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS), parts=st.lists(st.sampled_from([*SPECIAL, " ", "  \n", "The", "teacher", "ß", "你好"]), max_size=9)
)
def test_what_a_text_does_not_spell_is_read_as_ever(kind: Callable[[], PreTrainedTokenizerFast], parts: Sequence[str]) -> None:
    special, text = special_of(kind), "".join(parts)
    (guarded,) = special.encode([text + "<s>"], [[(len(text), len(text) + 3)]], add_special_tokens=False)
    (plain,) = special.encode([text + "["], [()], add_special_tokens=False)
    until = int((plain.spans[:, 1] <= len(text.rstrip())).sum())
    assert guarded.input_ids[:until].tolist() == plain.input_ids[:until].tolist()
    assert guarded.spans[:until].tolist() == plain.spans[:until].tolist()


def test_marks_that_a_family_does_not_call_special_and_tags() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<｜User｜>", "<think>", "[INST]")])
    text = "<｜User｜>a<think>b</think>[INST][1]"
    assert [text[a:b] for a, b in SpecialText(tokenizer).spelled(text)] == ["<｜User｜>", "[INST]"]


def test_plain_text_stays_plain_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    (document,) = read(tmp_path, tokenizer, ["a <|end|> b<|end|>"])
    found = tokens_of(document, tokenizer)
    assert np.flatnonzero(found.input_ids == 0).tolist() == [len(found.input_ids) - 1]  # the one that closes it
    assert found.byte_end[-2:].tolist() == [len(document.text)] * 2
    assert tokenizer.decode(found.input_ids) == document.text + "<|end|>"
    (document,) = read(tmp_path, tokenizer, ["a <|end|> b<|end|>"], special_tokens="tokens")
    assert (tokens_of(document, tokenizer).input_ids == 0).sum() == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", ["\U0010ffff", "\U0010ffff\U0010fffe", "\U0010fffd\U0010ffff"])
def test_a_text_may_hold_what_marks_others(kind: Callable[[], PreTrainedTokenizerFast], own: str) -> None:
    """It reads as with others of their kind."""
    special, others = special_of(kind), str.maketrans("\U0010ffff\U0010fffe\U0010fffd", "\U0001ffff\U0002fffe\U000f0000")
    found = []
    for odd in (own, own.translate(others)):
        text = f"The {odd}</s> speaks <s>{odd} once {odd}<|user|>"
        spelled = special.spelled(text)
        (read,) = special.encode([text], [spelled[:1]], add_special_tokens=False)
        around = special.encode(["a <s>", text], [[(2, 5)], spelled[:1]], add_special_tokens=False)[1]
        assert (around.input_ids.tolist(), around.spans.tolist()) == (read.input_ids.tolist(), read.spans.tolist())
        assert [text[a:b] for i, (a, b) in zip(read.input_ids, read.spans.tolist(), strict=True) if i in (1, 2, 3)] == [
            "<s>",
            "<|user|>",
        ]
        found.append((len(read.input_ids), read.spans.tolist()))
    assert found[0] == found[1]


def test_a_text_that_holds_noncharacters_beside_special_tokens_comes_back(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    text = "".join(map(chr, range(0x10FFF0, 0x110000))) + "a<|end|>\U0010ffff<|end|>"
    (document,) = read(tmp_path, tokenizer, [text])
    found = tokens_of(document, tokenizer)
    assert tokenizer.decode(found.input_ids) == text + "<|end|>"
    assert np.flatnonzero(found.input_ids == 0).tolist() == [len(found.input_ids) - 1]
    assert found.byte_end[-1] == len(text.encode())


@pytest.mark.parametrize("trim", [True, False])
def test_white_space_counts_and_has_its_bytes(trim: bool) -> None:
    tokenizer = byte_level(trim_offsets=trim)
    prompt, completion = "Say  ", " a word \n  \t "
    document = Document(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))
    found = tokens_of(document, tokenizer)
    assert found.byte_end[-2] == found.byte_end[-1] == len(document.text)
    assert (np.diff(found.byte_end.astype(int))[:-1] > 0).all()
    assert str(tokenizer.decode(found.input_ids[found.counts])).endswith(" a word \n  \t </s>")


@pytest.mark.parametrize("kind", [metaspace, unigram])
def test_each_window_begins_with_the_tokenizers_beginning_of_text(kind: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = kind()
    found = tokens_of(Document(" ".join(PROSE[:1] * 6)), tokenizer)
    segments = list(cut(found, 24, 5, source=0, number=0))
    assert len(segments) > 3
    assert all(segment.input_ids[0] == 1 for segment in segments)
    assert [segment.context_only for segment in segments] == [0] + [6] * (len(segments) - 1)
    assert np.concatenate([s.input_ids[s.context_only :] for s in segments]).tolist() == found.input_ids.tolist()


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_text_that_ends_itself_is_ended(append_eos: bool) -> None:
    completed = Document("What? Yes", ((6, 9),))
    for tokenizer, document in ((unigram(), completed), (make_tokenizer(), Document("What? Yes<|end|>", ((6, 16),)))):
        found = tokens_of(document, tokenizer, append_eos=append_eos)
        assert found.ended
        assert loss_mask_of(found)[-2:].tolist() == [COUNTS, 0]
        assert found.byte_end[-1] == len(document.text)
    open_end = tokens_of(completed, metaspace(), append_eos=append_eos)
    assert open_end.ended == append_eos
    assert loss_mask_of(open_end)[-1] == (0 if append_eos else 2)
