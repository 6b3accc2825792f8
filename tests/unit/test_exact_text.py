"""What a student goes on from and what it writes is text of whole characters, byte for byte, or it is refused."""

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from student_train.student.exact_text import ExactText
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.tokens import TokenizedDocument, tokenize
from tests.tiny import byte_fallback_tokenizer, make_tokenizer

TEXT = "学生学习 🙂 and the cache \ufffd its"


def tokenized(tokenizer: PreTrainedTokenizerFast, text: str) -> TokenizedDocument:
    document = Document(text=text, counted=None, lexer=None)
    (found,) = tokenize([document], tokenizer, append_eos=True, keywords=frozenset())
    return found


@pytest.fixture(params=["byte level", "byte level with a beginning token", "byte fallback"], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    kinds = {"byte level": make_tokenizer, "byte fallback": byte_fallback_tokenizer}
    return kinds[request.param]() if request.param in kinds else make_tokenizer(bos=True)


def test_a_beginning_is_whole_characters_of_the_document(tokenizer: PreTrainedTokenizerFast) -> None:
    document, texts = tokenized(tokenizer, TEXT), ExactText(tokenizer)
    ids, byte_end = document.input_ids.tolist(), document.byte_end.tolist()
    shifted = 0
    for start in range(len(ids)):
        for length in range(1, len(ids) - start + 1):
            found = texts.begin(ids[start:], byte_end[start:], length, 999)
            if found is None:
                continue
            assert found.text in TEXT
            assert found.text
            assert tokenizer.eos_token not in found.text
            assert len(found.ids) <= length + found.own
            shifted += found.shifted
            assert texts.written(found, ()) == ("", False)
    assert shifted > 10
    whole = texts.begin(ids, byte_end, len(ids), 999)
    assert whole is not None
    assert whole.text == TEXT


def test_of_a_long_beginning_the_end_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    document, texts = tokenized(tokenizer, TEXT), ExactText(tokenizer)
    ids, byte_end = document.input_ids.tolist(), document.byte_end.tolist()
    for room in range(4, 12):
        found = texts.begin(ids, byte_end, len(ids), room)
        assert found is not None
        assert len(found.ids) <= room
        assert TEXT.endswith(found.text)


def test_what_a_student_writes_is_whole_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    document, texts = tokenized(tokenizer, TEXT), ExactText(tokenizer)
    ids, byte_end = document.input_ids.tolist()[:-1], document.byte_end.tolist()[:-1]
    cuts = 0
    for cut in range(1, len(ids)):
        beginning = texts.begin(ids, byte_end, cut, 999)
        if beginning is None:
            continue
        rest = ids[len(beginning.ids) :]
        for length in range(1, len(rest) + 1):
            text, cut_off = texts.written(beginning, rest[:length])
            cuts += cut_off
            assert TEXT.startswith(beginning.text + text)
        assert texts.written(beginning, rest) == (TEXT[len(beginning.text) :], False)
    assert cuts > 10


def test_marks_within_a_windows_beginning_are_seen(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, plain = ExactText(tokenizer), tokenizer.backend_tokenizer.encode("the cache", add_special_tokens=True).ids
    assert not texts.has_marks([])
    assert not texts.has_marks(plain)
    assert texts.has_marks([*plain, int(tokenizer.eos_token_id)])
    assert texts.spells_special(f"a{tokenizer.eos_token}b")
    assert not texts.spells_special("a b")


def test_what_is_no_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ExactText(tokenizer)

    def ids_of(text: str) -> Sequence[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    document = tokenized(tokenizer, "the cache")
    beginning = texts.begin(document.input_ids.tolist(), document.byte_end.tolist(), 99, 999)
    assert beginning is not None
    broken = ids_of("学")[-1]
    assert texts.written(beginning, [*ids_of("d"), broken, *ids_of("and")])[1]
    assert texts.written(beginning, [*ids_of("d"), broken, *ids_of("and")])[0].strip() == "d"
    eos = tokenizer.eos_token_id
    assert texts.begin([eos], [0], 1, 9) is None
    assert texts.begin([broken], [3], 1, 9) is None
