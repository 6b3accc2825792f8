"""Two tokenizations of one text: what tokens spell, how a text is told again in other tokens, which rows stand beside each other."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError, MismatchError
from student_train.align.retokenise import retokenise
from student_train.align.spelling import FIRST_MARK, Spelling, spellings
from student_train.align.turns import TURN, TurnPair, tell_chat
from student_train.align.unit_view import SegmentText, _aligned, segment_text
from student_train.align.vocabularies import Vocabularies
from student_train.align.walk import align
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.tokens import tokenize
from tests.tiny import byte_fallback_tokenizer, make_other_tokenizer, make_tokenizer

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": make_tokenizer,
    "another byte level": make_other_tokenizer,
    "byte fallback": byte_fallback_tokenizer,
    "with a beginning": lambda: make_tokenizer(bos=True),
}
TOKENIZERS = {name: make() for name, make in KINDS.items()}
PIECES = (
    "the cache", "学生学习", "🙂", "👩‍👩‍👧", "e\u0301", "\t\t", "\r\n", "  ", " ", "1234567", "def f(x):\n    return x", "ﬁ", "�", "<|end|>", "</s>", "▽",
)  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
kinds = st.sampled_from(sorted(KINDS))


def both(teacher: str, student: str) -> tuple[Spelling, Spelling]:
    return spellings(TOKENIZERS[teacher], TOKENIZERS[student])


def told(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """As the planner does: special tokens that a text spells are text; the end of the text behind it."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids = backend.encode(text, add_special_tokens=False).ids
    backend.encode_special_tokens = False
    return np.asarray([*ids, tokenizer.eos_token_id], np.int64)


def symbols(text: str) -> str:
    return text.encode().decode("latin-1")


@settings(max_examples=150, deadline=None)
@given(text=texts, teacher=kinds, student=kinds)
def test_a_text_is_told_again_symbol_by_symbol(text: str, teacher: str, student: str) -> None:
    mine, other = both(teacher, student)
    spelled, ends = mine.spelled(told(TOKENIZERS[teacher], text))
    if teacher == "byte fallback":
        assert spelled[0] == " "  # its own; the cache's byte ends tell it from the text's
        spelled, ends = spelled[1:], ends - 1
    assert spelled[:-1] == symbols(text)
    assert ord(spelled[-1]) >= FIRST_MARK
    assert ends[-1] == len(spelled)
    again = retokenise(spelled, other, "here")
    leading = len(other.put_before)
    assert tuple(again.input_ids[:leading]) == other.put_before
    assert again.input_ids[-1] == TOKENIZERS[student].eos_token_id
    assert (again.ends[:leading] == 0).all()
    assert (np.diff(again.ends[leading:]) > 0).all()
    assert again.ends[-1] == len(spelled)
    for token, (start, stop) in zip(again.input_ids[leading:], pairwise([0, *again.ends[leading:].tolist()]), strict=True):
        own = other.symbols[token]
        assert own == spelled[start:stop] or (start == 0 and student == "byte fallback" and own == " " + spelled[:stop])


@settings(max_examples=60, deadline=None)
@given(text=texts, first=st.integers(0, 20), count=st.integers(1, 20), student=kinds)
def test_a_window_that_cuts_characters_is_told_without_their_parts(text: str, first: int, count: int, student: str) -> None:
    mine, other = both("byte level", student)
    spelled, _ = mine.spelled(told(TOKENIZERS["byte level"], text)[first : first + count])
    again = retokenise(spelled, other, "here")
    own = again.input_ids[len(other.put_before) :]
    ends = again.ends[len(other.put_before) :]
    if not len(own):
        return
    start = next(
        n for n in range(4) if spelled[n : int(ends[0])] in (other.symbols[own[0]], other.symbols[own[0]].removeprefix(" "))
    )
    for token, (first, stop) in zip(own.tolist(), pairwise([start, *ends.tolist()]), strict=True):
        assert other.symbols[token] in (spelled[first:stop], " " + spelled[first:stop])
    assert len(spelled) - ends[-1] < 4


@settings(max_examples=60, deadline=None)
@given(text=texts.filter(lambda text: "<" not in text), first=st.integers(0, 20), count=st.integers(1, 20), kind=kinds)
def test_the_text_of_a_window_is_held_against_where_its_tokens_end(text: str, first: int, count: int, kind: str) -> None:
    """Windows that begin and end anywhere, inside characters too; and one whose cache says otherwise."""
    document = Document(text=text, counted=None, lexer=None)
    (found,) = tokenize([document], TOKENIZERS[kind], append_eos=True, keywords=frozenset())
    mine, _ = both(kind, kind)
    ids, byte_end = found.input_ids.astype(np.int64), found.byte_end.astype(np.int64)
    whole = segment_text(ids, byte_end, 0, mine, "here").symbols
    assert whole[:-1] == symbols(text)
    window = slice(first, first + count)
    if not len(ids[window]):
        return
    part = segment_text(ids[window], byte_end[window], 0, mine, "here")
    alone = kind == "byte fallback" and first == 0 and len(ids[window]) == 1  # the space that it puts before a text
    assert part.symbols in whole or alone
    assert part.ends[-1] == len(part.symbols)
    if text.isascii() and len(ids) > 4:
        with pytest.raises(MismatchError, match="do not spell the text that they were made of"):
            segment_text(ids, np.where(np.arange(len(ids)) >= len(ids) - 2, byte_end + 1, byte_end), 0, mine, "here")


def slow_align(teacher: list[int], student: list[int]) -> list[tuple[int, int, bool, bool]]:
    """By definition, every row against every row."""
    found = []
    for row, end in enumerate(student):
        behind = [t for t, other in enumerate(teacher) if other <= end]
        t = max(behind, default=-1)
        spoken = end - (teacher[t] if behind else end)
        following = teacher[t + 1] if behind and t + 1 < len(teacher) else None
        mine = student[row + 1] if row + 1 < len(student) else None
        within = following is not None and mine is not None and end < mine <= following
        found.append((t, spoken, within and mine == following and spoken == 0, within))
    return found


ends_lists = st.lists(st.integers(0, 4), max_size=9).map(lambda steps: np.cumsum(steps).tolist())


@settings(max_examples=300, deadline=None)
@given(teacher=ends_lists, student=ends_lists, begun=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_the_walk_is_what_it_says(teacher: list[int], student: list[int], begun: tuple[int, int]) -> None:
    teacher, student = [0] * begun[0] + teacher, [0] * begun[1] + student
    found = align(np.asarray(teacher, np.int64), np.asarray(student, np.int64))
    rows = zip(found.teacher.tolist(), found.spoken.tolist(), found.one_to_one.tolist(), found.within.tolist(), strict=True)
    assert list(rows) == slow_align(teacher, student)


def test_the_same_tokenizer_is_one_to_one() -> None:
    mine, other = both("byte level", "byte level")
    ids = told(TOKENIZERS["byte level"], "".join(PIECES))
    spelled, ends = mine.spelled(ids)
    again = retokenise(spelled, other, "here")
    assert again.input_ids.tolist() == ids.tolist()
    found = align(ends, again.ends)
    assert found.one_to_one[:-1].all()
    assert found.teacher.tolist() == list(range(len(ids)))


def test_marks_are_the_same_by_role_and_by_name() -> None:
    mine, other = both("byte level", "another byte level")
    ends = [one.symbols[int(one.tokenizer.eos_token_id)] for one in (mine, other)]
    assert ends[0] == ends[1]
    user = mine.symbols[int(mine.tokenizer.get_vocab()["<|user|>"])]
    assert user not in other.marks
    with pytest.raises(MismatchError, match=r"special token that the student's tokenizer lacks.*place 2"):
        retokenise("ab" + user, other, "here")


def test_a_tokenizer_that_changes_the_text_is_refused_where_it_does() -> None:
    lower = make_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    _, other = spellings(make_tokenizer(), lower)
    with pytest.raises(MismatchError, match=r"changes the text; expected b'C'; found b'c'; in here, byte 2"):
        retokenise("abC", other, "here")


def test_a_tokenizer_without_bytes_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models

    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(InputError, match=r"do not say which bytes they are.*found WordPiece.*the student's"):
        spellings(make_tokenizer(), other)


def test_the_vocabularies_beside_each_other() -> None:
    mine, other = both("byte level", "byte fallback")
    vocabularies = Vocabularies(mine, other, len(other.symbols) + 3)
    outcomes = vocabularies.common()
    for token, outcome in enumerate(outcomes.teacher.tolist()):
        same = [n for n, symbols in enumerate(other.symbols) if symbols and symbols == mine.symbols[token]]
        assert (outcome < outcomes.common) == bool(same)
        assert all(outcomes.student[n] == outcome for n in same)
    assert (outcomes.student[-3:] == outcomes.common + 1).all()
    for spoken in (0, 1, 2):
        for token, found in enumerate(vocabularies.beginning(spoken).tolist()):
            rest = mine.symbols[token][spoken:]
            longest = max((s for s in other.symbols if s and rest.startswith(s)), key=len, default="")
            assert (other.symbols[found] if found < vocabularies.rows else "") == longest
            assert found not in other.fallback or longest not in {s for n, s in enumerate(other.symbols) if n not in other.fallback}
    places = vocabularies.sorted_places()
    for start in ("", " ", "t", "th", "zzz", symbols("学")[:2]):
        first, last = vocabularies.places_that_begin(start)
        assert {n for n, place in enumerate(places.tolist()) if first <= place < last} == {
            n for n, spelled in enumerate(mine.symbols) if spelled.startswith(start)
        }


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
HEADED = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}\n\n{% endfor %}"
words = st.text(st.sampled_from("ab \n学🙂1[]#"), min_size=1, max_size=8).map(str.strip).filter(bool)


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_other_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(words, min_size=2, max_size=6).filter(lambda found: len(found) % 2 == 0),
    system=st.none() | words,
    template=st.sampled_from([INST, HEADED]),
    cut=st.integers(0, 12),
)
def test_a_chat_is_told_again_in_the_students_template(contents: list[str], system: str | None, template: str, cut: int) -> None:
    """What the student's own template renders, tokenised as transformers does; and the words at the same places on both sides."""
    teacher, student = make_tokenizer(), with_template(template)
    mine, other = spellings(teacher, student)
    pair = TurnPair.of(mine, other)
    assert pair is not None
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    messages = messages if system is None else [{"role": "system", "content": system}, *messages]
    text = str(teacher.apply_chat_template(messages, tokenize=False))
    ids = np.asarray(teacher.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    spelled, _ = mine.spelled(ids)
    chat = tell_chat(spelled, pair)
    if template == INST and system is not None:
        assert chat is None  # a role that the student's template lacks
        return
    assert chat is not None
    again = retokenise(chat.student, other, "here", begins=pair.student.begins)
    rendered = str(student.apply_chat_template(messages, tokenize=False))
    assert again.input_ids.tolist() == student.backend_tokenizer.encode(rendered, add_special_tokens=False).ids
    assert len(chat.teacher_places) == len(spelled) + 1
    assert len(chat.student_places) == len(chat.student) + 1
    assert chat.teacher_places[-1] == chat.student_places[-1] == len(chat.common)
    for content in contents:
        assert symbols(content) in chat.common
    cut_off, _ = mine.spelled(ids[: max(1, len(ids) - cut)])
    part = tell_chat(cut_off, pair)
    if part is not None:
        assert chat.common.startswith(part.common.rstrip(TURN)[:-1])


def test_templates_that_cannot_be_taken_apart_are_refused() -> None:
    numbered = "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    mine, other = spellings(make_tokenizer(), with_template(numbered))
    with pytest.raises(InputError, match=r"puts other things around some turns.*the student's chat template"):
        TurnPair.of(mine, other)
    none = with_template(numbered)
    none.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        TurnPair.of(*spellings(make_tokenizer(), none))
    assert TurnPair.of(mine, mine) is None


def test_a_mark_is_the_same_by_name_before_it_is_the_end() -> None:
    """Where the student has the teacher's end under its name, a chat keeps it, whatever the student's own end is."""
    teacher, student = make_tokenizer(), make_tokenizer(bos=True)
    student.eos_token = "<|bos|>"
    mine, other = spellings(teacher, student)
    assert mine.symbols[0] == other.symbols[0]
    assert mine.symbols[1] == other.symbols[1]
    assert mine.symbols[0] != mine.symbols[1]


def test_a_token_with_a_space_that_is_no_text_is_compared_nowhere() -> None:
    """SentencePiece puts one before a text, behind a mark too: the token is ▁b, the text is b."""
    mine, other = both("byte level", "byte fallback")
    end = mine.symbols[0]
    text = f"a{end}bc"
    told = retokenise(text, other, "here")
    assert other.symbols[told.input_ids[-3]] == " "
    ids = np.asarray([mine.token_of[symbol] for symbol in text])
    spelled, ends = mine.spelled(ids)
    assert spelled == text
    found = _aligned(SegmentText(text, ends, -1), np.ones(4, np.int64), told, Vocabularies(mine, other, len(other.symbols)))
    before = told.bare.nonzero()[0] - 1
    assert len(before) == 2  # of each run of text; the first has no row before it
    assert not found["one_to_one"][before].any()
    assert not found["within"][before].any()
    assert (found["teacher"][before[before >= 0]] == -1).all()
    assert found["one_to_one"].any()


def test_added_tokens_spell_what_the_vocabularys_own_would() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    _, other = spellings(make_tokenizer(), tokenizer)
    assert other.symbols[-1] == "  "


def test_a_tokenizer_without_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models

    nothing = Tokenizer(models.BPE())
    nothing.decoder = decoders.ByteLevel()
    with pytest.raises(InputError, match="has no tokens"):
        spellings(make_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=nothing))
