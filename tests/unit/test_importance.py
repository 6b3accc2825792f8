"""Roles of words and the weights that follow from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signal_store.errors import InputError, NotFoundError
from signal_store.format.roles import LEVELS, POS
from student_train.importance.rules import Corners, load_rules
from student_train.importance.token_weights import TokenWeights, surface
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.roles import Word, make_tagger, token_roles
from teacher_cache.recipe import TaggerSection

RULES = load_rules()
UNIT = st.floats(0, 1)


def roles_of(**names: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray([[LEVELS[level].index(names.get(level, "none")) for level in LEVELS]], np.uint8)


@given(impact=UNIT, more=UNIT, confidence=UNIT)
def test_weights_stay_between_and_grow_with_impact(impact: float, more: float, confidence: float) -> None:
    low, high = sorted((impact, more))
    found = surface(np.asarray([low, high], np.float32), np.full(2, confidence, np.float32), RULES.corners)
    assert (found >= 0.2).all()
    assert (found <= 3.0).all()
    assert found[0] <= found[1] + 1e-6


def test_both_ends_are_reached_and_nothing_jumps() -> None:
    ends = surface(np.asarray([0, 1, 1, 0], np.float32), np.asarray([1, 0, 1, 0], np.float32), RULES.corners)
    assert ends.tolist() == pytest.approx([0.2, 3.0, 1.5, 0.7])
    grid = np.linspace(0, 1, 2001, dtype=np.float64)
    for weights in (surface(grid, 0 * grid + 0.3, RULES.corners), surface(0 * grid + 0.3, grid, RULES.corners)):  # type: ignore[arg-type]
        slope = np.diff(weights) / np.diff(grid)
        assert np.abs(np.diff(slope)).max() < 0.02
        assert abs(slope[0]) < 0.01
        assert abs(slope[-1]) < 0.01


@given(confidence=UNIT)
def test_function_words_weigh_least(confidence: float) -> None:
    token_weights = TokenWeights.of(RULES, 1000)
    entropy = np.full(1, (1 - confidence) * np.log(1000))
    weight = {name: float(token_weights.weights(roles_of(pos=name), entropy)[0]) for name in POS[1:]}
    for anchor in ("entity_noun", "noun", "verb", "connective"):
        assert weight["function"] < weight[anchor]
        assert weight["punctuation"] < weight[anchor]


def test_a_level_that_says_nothing_gives_its_share_away() -> None:
    token_weights = TokenWeights.of(RULES, 1000)
    assert token_weights.impact(roles_of(pos="verb"))[0] == pytest.approx(0.9)
    both = roles_of(pos="verb", dependency="root")
    assert token_weights.impact(both)[0] == pytest.approx((0.4 * 0.9 + 0.3 * 0.95) / 0.7)
    assert token_weights.impact(roles_of(code="keyword"))[0] == pytest.approx(0.95)
    assert token_weights.impact(roles_of())[0] == pytest.approx(RULES.default)


def test_a_users_rules_replace_single_values(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("pos:\n  noun: 0.1\ncorners:\n  high_confident: 1.2\n")
    rules = load_rules(own)
    assert rules.pos == {**RULES.pos, "noun": 0.1}
    assert rules.corners == Corners(**{**RULES.corners.model_dump(), "high_confident": 1.2})
    assert rules.digest != RULES.digest
    for content, words in (("pos:\n  nuon: 0.1\n", "nuon"), ("corners:\n  low_unsure: 9\n", "low_unsure"), ("- 1\n", "mapping")):
        own.write_text(content)
        with pytest.raises(InputError, match=words):
            load_rules(own)
    with pytest.raises(NotFoundError):
        load_rules(tmp_path / "none.yaml")


def test_code_has_roles_by_its_lexer() -> None:
    tagger, _ = make_tagger(TaggerSection(parser="pygments"))
    text = "def add(a):\r\n    return a + 1  # more\n"
    found = {text[word.start : word.stop]: word.code for word in tagger(Document(text, lexer="python"))}
    expected = {"def": "keyword", "add": "definition", "a": "identifier", "return": "keyword", "+": "operator", "1": "literal"}
    assert {name: found[name] for name in expected} == expected
    assert found["# more"] == "comment"
    assert list(tagger(Document(text))) == []


@given(
    words=st.lists(st.integers(1, 5), max_size=8),
    tokens=st.lists(st.integers(0, 4), max_size=12),
    gap=st.integers(0, 2),
)
def test_words_become_tokens_by_overlap(words: list[int], tokens: list[int], gap: int) -> None:
    spans, position = [], 0
    for length in tokens:
        spans.append((position, position + length))
        position += length
    found_words, position = [], 0
    for number, length in enumerate(words):
        found_words.append(Word(position, position + length, pos=POS[1 + number % 5]))
        position += length + gap
    ends = np.asarray(spans, np.int64).reshape(-1, 2)
    found, begins = token_roles(lambda _: found_words, Document("x"), ends)
    assert begins.sum() <= len(found_words)
    for (start, stop), role in zip(spans, found, strict=True):
        shared = [max(0, min(stop, w.stop) - max(start, w.start)) for w in found_words]
        best = max(shared, default=0)
        expected = POS.index(found_words[shared.index(best)].pos) if best else 0
        assert role[0] == expected
