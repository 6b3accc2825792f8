"""Divergences across two vocabularies: closed form, autograd and counting by hand are one; the same vocabulary is the plain case."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.align.spelling import Spelling
from student_train.align.vocabularies import Vocabularies
from student_train.data.aligned_rows import AlignedRows
from student_train.losses.across import AcrossDivergence
from student_train.losses.divergence import Softened
from student_train.losses.likelihood import surprise_gap
from student_train.losses.prefix import Prefix
from student_train.losses.strict import DIVERGENCES, Strict
from student_train.losses.uld import Uld

INNER = sorted(DIVERGENCES)
WORDS = ["".join(word) for length in (1, 2, 3) for word in product("abc", repeat=length)]
vocabulary_of = st.lists(st.sampled_from(["", *WORDS]), min_size=2, max_size=14)
"""Tokens by id: some spell the same, some nothing."""


def both(teacher: list[str], student: list[str], more: int = 0) -> Vocabularies:
    none: Any = None
    return Vocabularies(Spelling(none, tuple(teacher), {}), Spelling(none, tuple(student), {}), len(student) + more)


def rows_of(vocabularies: Vocabularies, spoken: list[str]) -> AlignedRows:
    """As they are where a teacher's token that begins with these symbols comes."""
    ranges = torch.tensor([vocabularies.places_that_begin(one) for one in spoken])
    lengths = torch.tensor([len(one) for one in spoken])
    every = torch.ones(len(spoken), dtype=torch.bool)
    return AlignedRows(lengths == 0, lengths == 0, every, lengths, ranges[:, 0], ranges[:, 1], lengths)


def logits(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul(2)


def across(name: str, inner: str, vocabularies: Vocabularies) -> AcrossDivergence:
    if name == "strict":
        return Strict(DIVERGENCES[inner], vocabularies.common(), "one_to_one")  # type: ignore[index]
    return Prefix(DIVERGENCES[inner], vocabularies) if name == "prefix" else Uld()  # type: ignore[index]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", ["strict", "prefix", "uld"])
@settings(max_examples=25, deadline=None)
@given(teacher=vocabulary_of, student=vocabulary_of, more=st.integers(0, 2), seed=st.integers(0, 99), data=st.data())
def test_the_closed_form_is_what_autograd_finds(
    name: str, inner: str, teacher: list[str], student: list[str], more: int, seed: int, data: st.DataObject
) -> None:
    teacher = [*teacher, "a"]  # a token at least that both have
    student = [*student, "a"]
    vocabularies = both(teacher, student, more)
    spoken = data.draw(st.lists(st.sampled_from(["", "", "a", "ab"]), min_size=1, max_size=4))
    spoken = [one for one in spoken if any(t.startswith(one) and len(t) > len(one) for t in teacher)] or [""]
    made, rows = across(name, inner, vocabularies), rows_of(vocabularies, spoken)
    counts = made.counts(rows)
    z_BV, z_BW = logits(len(spoken), len(teacher), seed), logits(len(spoken), vocabularies.rows, seed + 1).requires_grad_()
    losses, gradient = made.closed_form(Softened.of(z_BV), Softened.of(z_BW.detach()), rows)
    expected = made.dense(z_BV.log_softmax(1), z_BW.log_softmax(1), rows)
    found = torch.autograd.grad(expected[counts].sum(), z_BW)[0] if counts.any() else torch.zeros_like(z_BW)
    torch.testing.assert_close(losses[counts], expected[counts].detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient[counts], found[counts], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", ["strict", "prefix"])
def test_one_vocabulary_is_the_plain_divergence(name: str, inner: str) -> None:
    words = [*WORDS, ""]
    made, plain = across(name, inner, both(words, words)), DIVERGENCES[inner]  # type: ignore[index]
    p, q = (Softened.of(logits(5, len(words), seed).index_fill(1, torch.tensor([len(words) - 1]), -1e30)) for seed in (1, 2))
    rows = rows_of(both(words, words), [""] * 5)
    for found, expected in zip(made.closed_form(p, q, rows), plain.closed_form(p, q), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(teacher=vocabulary_of, student=vocabulary_of, spoken=st.sampled_from(["", "a", "b", "ab", "abc"]), seed=st.integers(0, 99))
def test_prefix_targets_by_hand(teacher: list[str], student: list[str], spoken: str, seed: int) -> None:
    """Every token of the teacher's, one by one: given that it begins with what is spoken, which token of the student begins the
    rest."""
    alike = [n for n, word in enumerate(teacher) if word.startswith(spoken)]
    if all(len(teacher[n]) <= len(spoken) for n in alike):
        return  # nothing is inside a token there
    vocabularies = both(teacher, student)
    p_BV = logits(1, len(teacher), seed).softmax(1)
    target = Prefix(DIVERGENCES["forward_kl"], vocabularies).target(p_BV, rows_of(vocabularies, [spoken]))[0]
    expected = torch.zeros(len(student) + 1, dtype=torch.float64)
    for number in alike:
        rest = teacher[number][len(spoken) :]
        begun = [word for word in student if word and rest.startswith(word)]
        place = student.index(max(begun, key=len)) if begun else len(student)
        expected[place] += p_BV[0, number] / p_BV[0, alike].sum()
    torch.testing.assert_close(target, expected)
    assert float(target.sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["strict", "prefix", "uld"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), data=st.data())
def test_renumbering_ids_changes_nothing(name: str, seed: int, data: st.DataObject) -> None:
    teacher, student = WORDS[:20], WORDS[3:30]
    spoken = ["", "a", "ab"]
    orders = [data.draw(st.permutations(range(len(words)))) for words in (teacher, student)]
    z_BV, z_BW = logits(3, len(teacher), seed), logits(3, len(student), seed + 1)
    before = both(teacher, student)
    after = both([teacher[n] for n in orders[0]], [student[n] for n in orders[1]])
    losses, gradient = across(name, "forward_kl", before).closed_form(Softened.of(z_BV), Softened.of(z_BW), rows_of(before, spoken))
    moved = across(name, "forward_kl", after).closed_form(
        Softened.of(z_BV[:, orders[0]]), Softened.of(z_BW[:, orders[1]]), rows_of(after, spoken)
    )
    torch.testing.assert_close(moved[0], losses)
    torch.testing.assert_close(moved[1], gradient[:, orders[1]])


def test_a_student_is_not_pushed_from_tokens_that_its_teacher_lacks() -> None:
    """The rest is one outcome: of equal mass on both sides, it and its tokens have no gradient."""
    teacher, student = ["a", "b", "cc"], ["a", "b", "ca", "cb"]
    p = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64)
    q = torch.tensor([[0.3, 0.3, 0.1, 0.3]], dtype=torch.float64)
    vocabularies = both(teacher, student)
    made = across("strict", "forward_kl", vocabularies)
    losses, gradient = made.closed_form(Softened.of(p.log()), Softened.of(q.log()), rows_of(vocabularies, [""]))
    assert losses.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("teacher", [0.0, 0.3, 7.0])
def test_the_gap_of_surprises_is_the_limit_of_a_binary_cross_entropy(teacher: float) -> None:
    a, b = torch.tensor([teacher], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    gap = surprise_gap(a, b)
    temperature = 1e6
    p, q = torch.exp(-a / temperature), torch.exp(-b / temperature)
    whole = -(p * q.log() + (1 - p) * (1 - q).log()) + (torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    torch.testing.assert_close(gap, temperature * whole, rtol=1e-4, atol=1e-4)
    assert torch.autograd.gradcheck(lambda b: surprise_gap(a, b), (b,))
    torch.testing.assert_close(torch.autograd.grad(surprise_gap(a, b), b)[0], 1 - a / b.detach())
    assert float(surprise_gap(b.detach(), b.detach())) == pytest.approx(0, abs=1e-12)
