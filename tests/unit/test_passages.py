"""Sentences and key words of prompts, and what evidence and coverage make of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_taps.coverage import coverage, log_misses
from model_taps.evidence import evidence_shares
from model_taps.spread import evenly
from signal_store.format.roles import CODE, POS
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.passages import key_words, sentences


def by_character(text: str) -> NDArray[np.int64]:
    return np.stack([np.arange(len(text)), np.arange(1, len(text) + 1)], 1)


def said(prompt: str, answer: str = "yes", lexer: str | None = None) -> list[str]:
    text = prompt + answer
    document = Document(text, ((len(prompt), len(text)),), lexer, task="qa")
    return [text[a:b] for a, b in sentences(document, by_character(text))]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("One. Two! Three? ", ["One.", " Two!", " Three?"]),
        ("Pi is 3.14 here. Yes", ["Pi is 3.14 here.", " Yes"]),
        ("今天下雨。我们回家！好吗？", ["今天下雨。", "我们回家！", "好吗？"]),
        ("a\n\n---\nb", ["a\n", "b"]),
        ("", []),
        ("...", []),
    ],
)
def test_sentences(prompt: str, expected: list[str]) -> None:
    assert said(prompt) == expected


def test_a_line_of_code_is_one() -> None:
    assert said("x = y.z. w\nfor i in x:\n", lexer="python") == ["x = y.z. w\n", "for i in x:\n"]


@settings(max_examples=200)
@given(prompt=st.text(max_size=60), answer=st.text(min_size=1, max_size=5), width=st.integers(1, 4))
def test_sentences_are_apart_and_never_of_the_answer(prompt: str, answer: str, width: int) -> None:
    text = prompt + answer
    spans = np.asarray([(i, min(i + width, len(text))) for i in range(0, len(text), width)], np.int64).reshape(-1, 2)
    found = sentences(Document(text, ((len(prompt), len(text)),), task="qa"), spans)
    assert (found[:, 0] < found[:, 1]).all()
    assert (found[1:, 0] >= found[:-1, 1]).all()
    if len(found):
        assert spans[found[-1, 1] - 1, 1] <= len(prompt)


def test_key_words_are_nouns_and_names_the_most_frequent_first() -> None:
    noun, verb, name = POS.index("noun"), POS.index("verb"), CODE.index("identifier")
    roles = np.zeros((7, 4), np.uint8)
    roles[:, 0] = [noun, verb, noun, noun, 0, noun, noun]
    roles[4, 3] = name
    begins = np.asarray([True, True, True, True, True, False, True])
    found = key_words(np.asarray([5, 6, 7, 7, 8, 9, 5], np.uint32), roles, begins, 6)
    assert found.tolist() == [[2, 7], [0, 5], [4, 8]]


def test_evidence_is_the_share_of_each_sentence() -> None:
    rows = torch.zeros(3, 2, 6)
    rows[0, :, 0], rows[0, :, 3] = 0.5, 0.5  # segment 0: sentence 0..2 gets 0.5 + 0.2, sentence 2..4 gets 0.5 + 0.4
    rows[1, 0, 1], rows[1, 1, 2], rows[1, :, 5] = 0.4, 0.8, 0.2
    rows[2, :, 0] = 1
    ranges, of = torch.tensor([[0, 2], [2, 4], [0, 3]]), torch.tensor([0, 0, 1])
    found = evidence_shares(rows, torch.tensor([0, 0, 1]), ranges, of, 2)
    assert found.tolist() == pytest.approx([0.7 / 1.6, 0.9 / 1.6, 1.0])


def test_coverage_rises_with_each_probability_and_reaches_one() -> None:
    p = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
    words = torch.tensor([[0, 2]])
    found = coverage(log_misses(p.log(), torch.tensor([0, 0]), words))
    assert found[0].tolist() == pytest.approx([1 - 0.9 * 0.5, 1 - 0.3 * 0.75], rel=1e-5)
    more = coverage(log_misses(torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([0]), words))
    assert more[0, 0] == pytest.approx(1, abs=1e-5)


def test_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    ranges, of, rows_of = torch.tensor([[0, 2], [2, 5]]), torch.tensor([0, 0]), torch.tensor([0, 0, 0])

    def evidence(scores: torch.Tensor) -> torch.Tensor:
        return evidence_shares(scores.softmax(2), rows_of, ranges, of, 1)

    assert torch.autograd.gradcheck(evidence, scores)
    logits = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    words = torch.tensor([[1, 3], [0, 2]])

    def covered(logits: torch.Tensor) -> torch.Tensor:
        return coverage(log_misses(logits, torch.tensor([0, 0, 1, 1]), words))

    assert torch.autograd.gradcheck(covered, logits)


@given(rows=st.lists(st.integers(0, 40), min_size=1, max_size=5), most=st.integers(1, 20))
def test_rows_are_spread_over_each_group(rows: list[int], most: int) -> None:
    found = evenly(torch.tensor(rows), most)
    start = 0
    for group, count in enumerate(rows):
        mine = found.index[group][found.inside[group]].tolist()
        assert len(mine) == len(set(mine)) == min(count, most)
        assert all(start <= place < start + count for place in mine)
        start += count
