"""What every registered term must hold to, by being registered: a new file in student_train/losses is tested here without a line.

Settings go there and back; a cache without the term's signal is refused in one line; where the student is the teacher nothing is
left but the codecs' rounding; the gradient is finite and the slope of the value; parts of a batch add up to the whole, whatever the
order of its rows. Divergences besides: closed form, compiled and dense are one, with gradients in float64.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.head import OutputHead
from model_taps.loading import load_model
from run_kit.recipe_file import validate
from signal_store.cache import Cache, open_cache
from signal_store.errors import InputError, MismatchError
from student_train.align.aligned_cache import AlignedCache, longest_segment, student_vocabulary
from student_train.align.spelling import Spelling
from student_train.align.view_maker import make_view
from student_train.align.vocabularies import Vocabularies
from student_train.data.aligned_rows import AlignedRows
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.collate import collate
from student_train.data.sections import StreamSection
from student_train.data.signals.distribution import DistributionRequest
from student_train.data.stream import Stream
from student_train.data.unit import IGNORE
from student_train.losses import registry
from student_train.losses.across import AcrossDivergence
from student_train.losses.divergence import Divergence, Softened
from student_train.losses.head_terms import OutputTargets, OutputTerm
from student_train.losses.objective import Objective, resolve
from student_train.losses.output_head import IMPLEMENTATIONS, Impl, output_loss
from student_train.losses.section import Losses
from student_train.losses.term import AcrossTerm, GateTerm, LogitsTerm, StateTerm
from student_train.model.distiller import Distiller
from student_train.recipe import RunRecipe
from teacher_cache.commands.build import build
from tests.codes import made_codec, made_codes
from tests.conftest import Once, RecipeMaker
from tests.tiny import make_model, make_other_tokenizer

HEAD = {name: term for name, term in registry.terms().items() if isinstance(term, LogitsTerm)}
DIVERGENCES = [name for name, term in HEAD.items() if term.divergence is not None]
ACROSS = {name: term for name, term in registry.terms().items() if isinstance(term, AcrossTerm)}
LEVELS: dict[str, Any] = {"smoothness": {}, "attention_evolution": {}, "replay": {}}
PARTS = 4
ROWS = 2
"""Of a part."""


def losses_with(name: str) -> dict[str, Any]:
    """The least objective that the term can stand in, with its default settings but for a temperature that every cache serves."""
    settings = {"temperature": 1.0} if name in (*DIVERGENCES, *ACROSS) else {}
    return {name: settings, **(LEVELS if isinstance(registry.terms()[name], GateTerm) else {})}


def divergence_of(name: str) -> Divergence:
    made = HEAD[name].divergence
    assert made is not None
    return made(HEAD[name].section())


@pytest.mark.parametrize("name", list(registry.terms()))
def test_settings_go_there_and_back(name: str) -> None:
    losses = Losses.of({name: {}})
    assert getattr(losses, name) == registry.terms()[name].section()
    dumped = json.loads(json.dumps(losses.model_dump(mode="json")))
    assert {other for other, options in dumped.items() if options is not None} == {name}
    assert Losses.of(dumped) == losses
    assert getattr(Losses.of({name: None}), name) is None
    base = {"cache": "c", "out": "o", "student": {"checkpoint": "s"}, "steps": 1}
    with pytest.raises(InputError, match=rf"unknown key losses\.{name}x \(perhaps losses\.{name}\)"):
        validate({**base, "losses": {f"{name}x": {}}}, RunRecipe, "here")
    with pytest.raises(InputError, match=rf"unknown key losses\.{name}\.no_such_setting"):
        validate({**base, "losses": {name: {"no_such_setting": 1}}}, RunRecipe, "here")


@pytest.fixture(scope="module")
def distribution_alone(once: Once, recipe_for: RecipeMaker, texts: dict[str, Path]) -> Cache:
    return _bare(once, recipe_for, texts, "distribution-alone", {"distribution": {"rank": 8}})


@pytest.fixture(scope="module")
def statistics_alone(once: Once, recipe_for: RecipeMaker, texts: dict[str, Path]) -> Cache:
    return _bare(once, recipe_for, texts, "statistics-alone", {"distribution": None, "stats": {"layers": [1]}})


def _bare(once: Once, recipe_for: RecipeMaker, texts: dict[str, Path], name: str, signals: dict[str, Any]) -> Cache:
    sources = [{"name": "train", "jsonl": texts["validation"]}]
    folder = once(name, lambda folder: build(recipe_for(folder / "cache.zarr", signals=signals, sources=sources)))
    return open_cache(str(folder / "cache.zarr"))


Read = Callable[[Cache, str], Cache]


@pytest.fixture(scope="module")
def read_for(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """A cache as a term wants it read: one that compares across tokenizers by a student with another."""
    made: dict[str, Cache] = {}

    def read(cache: Cache, name: str) -> Cache:
        if name not in ACROSS:
            return cache
        if cache.uri not in made:
            view = make_view(cache, make_other_tokenizer(), str(tmp_path_factory.mktemp("views") / "view"))
            made[cache.uri] = AlignedCache(cache.parts, view)
        return made[cache.uri]

    return read


def student_of(cache: Cache, family: str = "qwen3") -> PreTrainedModel:
    return make_model(family, student_vocabulary(cache), seed=7, max_position_embeddings=max(64, longest_segment(cache)))


@pytest.mark.parametrize("name", list(registry.kinds()))
def test_a_cache_without_its_signal_is_refused_in_one_line(
    knowing_cache: Cache, distribution_alone: Cache, statistics_alone: Cache, name: str, read_for: Read
) -> None:
    student = student_of(read_for(knowing_cache, name), "llama")
    needs = resolve(Losses.of(losses_with(name)), read_for(knowing_cache, name), student).needs
    without = read_for(statistics_alone if needs.get(DistributionRequest) is not None else distribution_alone, name)
    lacking = [path for path in needs.reads(knowing_cache) if path not in without.capacity_rows]
    if not lacking:
        assert resolve(Losses.of(losses_with(name)), without, student)
        return
    with pytest.raises(MismatchError) as refused:
        resolve(Losses.of(losses_with(name)), without, student)
    assert "\n" not in str(refused.value)
    assert refused.value.expected


def distiller_of(cache: Cache, model: PreTrainedModel, name: str) -> tuple[Distiller, Objective]:
    torch.manual_seed(0)
    objective = resolve(Losses.of(losses_with(name)), cache, model)
    distiller = Distiller(model, objective)
    distiller.codecs = Codecs.of(cache, objective.needs, torch.device("cpu"))
    if objective.matched_layers:
        assert any(distiller.choose_heads(batch) for batch in batches_of(cache, objective, rows=PARTS * ROWS))
    return distiller, objective


def batches_of(cache: Cache, objective: Objective, rows: int, world: int = 1) -> Iterator[CodedBatch]:
    """All of the validation split, in micro-batches of so many rows."""
    config = StreamSection(sequence_length=longest_segment(cache), global_batch_rows=rows * world, micro_batch_rows=rows)
    streams = [Stream(cache, objective.needs, config, packed=True, rank=rank, world_size=world) for rank in range(world)]
    for stream in streams:
        yield from stream.once("validation", objective.needs)


def sum_and_count(distiller: Distiller, objective: Objective, batches: Iterator[CodedBatch], name: str) -> tuple[float, float]:
    total = count = 0.0
    for batch in batches:
        _, sums = distiller(batch, dict.fromkeys(objective.terms, 1.0), 0.3)
        distiller.close_taps()
        total, count = total + float(sums[name]), count + objective.counts(batch)[name]
    return total, count


@pytest.mark.parametrize("name", list(registry.kinds()))
def test_parts_add_up_to_the_whole_in_any_order(
    knowing_cache: Cache, name: str, read_for: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = read_for(knowing_cache, name)
    distiller, objective = distiller_of(cache, student_of(cache), name)
    if objective.gate is not None:
        objective.gate.observe(dict.fromkeys(objective.gate.levels, 1.0))
    whole, count = sum_and_count(distiller, objective, batches_of(cache, objective, PARTS * ROWS), name)
    assert count > 0

    def same(batches: Iterator[CodedBatch]) -> None:
        total, counted = sum_and_count(distiller, objective, batches, name)
        assert counted == count
        assert total == pytest.approx(whole, rel=1e-4, abs=1e-6 * count)

    same(batches_of(cache, objective, ROWS))
    same(batches_of(cache, objective, ROWS, world=2))
    reversed_rows: Any = lambda rows, *given, **named: collate(rows[::-1], *given, **named)
    monkeypatch.setattr("student_train.data.stream.collate", reversed_rows)
    same(batches_of(cache, objective, PARTS * ROWS))


@pytest.mark.parametrize("name", list(registry.state_terms()))
def test_a_term_on_states_is_had_across_tokenizers_or_refused_by_name(knowing_cache: Cache, name: str, read_for: Read) -> None:
    cache = read_for(knowing_cache, next(iter(ACROSS)))
    student = student_of(cache)
    if not registry.state_terms()[name].across:
        with pytest.raises(MismatchError, match=f"{name} compares token by token"):
            resolve(Losses.of({name: {}}), cache, student)
        return
    distiller, objective = distiller_of(cache, student, name)
    total, count = sum_and_count(distiller, objective, batches_of(cache, objective, PARTS * ROWS), name)
    assert count > 0
    assert math.isfinite(total)
    assert total > 0


@pytest.mark.parametrize("name", [name for name, term in registry.state_terms().items() if term.residue is not None])
def test_nothing_is_left_where_the_student_is_its_teacher(knowing_cache: Cache, name: str) -> None:
    model = load_model(knowing_cache.manifest.teacher.name, what="teacher", dtype=torch.float32)
    distiller, objective = distiller_of(knowing_cache, model, name)
    total, count = sum_and_count(distiller, objective, batches_of(knowing_cache, objective, PARTS * ROWS), name)
    residue = registry.state_terms()[name].residue
    assert residue is not None
    assert -1e-6 <= total / count <= residue
    other = make_model("qwen3", knowing_cache.manifest.tokenizer.vocab_size, seed=7)
    distiller, objective = distiller_of(knowing_cache, other, name)
    total, count = sum_and_count(distiller, objective, batches_of(knowing_cache, objective, PARTS * ROWS), name)
    assert total / count > 5 * residue


@pytest.mark.parametrize("name", list(registry.kinds()))
def test_its_gradient_is_finite_and_the_slope_of_its_value(knowing_cache: Cache, name: str, read_for: Read) -> None:
    """Along the gradient of the blocks' parameters, by a central difference; float32, as in training."""
    cache = read_for(knowing_cache, name)
    student = student_of(cache)
    distiller, objective = distiller_of(cache, student, name)
    batch = max(batches_of(cache, objective, PARTS * ROWS), key=lambda batch: objective.counts(batch)[name])
    scales = {other: float(other == name) / objective.counts(batch)[name] for other in objective.terms}

    def value() -> Tensor:
        total, _ = distiller(batch, scales, 0.3)
        distiller.close_taps()
        found: Tensor = total
        return found

    begun = value()
    begun.backward()
    every = [p.grad for p in distiller.parameters() if p.grad is not None]
    assert every
    assert all(gradient.isfinite().all() for gradient in every)
    term = registry.terms()[name]
    if isinstance(term, GateTerm):
        assert all(p.grad is None or not p.grad.any() for p in student.parameters()), "the gate teaches itself alone"
        return
    blocks = [p for p in student.model.layers.parameters() if p.grad is not None and p.grad.any()]
    assert blocks
    if isinstance(term, StateTerm) and not term.whole_gradient:
        return
    slope = float(torch.stack([p.grad.double().square().sum() for p in blocks if p.grad is not None]).sum().sqrt())
    step = 1e-3 * float(begun.detach()) / slope
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p in blocks:
                assert p.grad is not None
                p += sign * step * p.grad / slope
        ends.append(float(value().detach()))
        with torch.no_grad():
            for p in blocks:
                assert p.grad is not None
                p -= sign * step * p.grad / slope
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_where_the_two_are_one(name: str) -> None:
    log_p = torch.randn(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(1)
    rows, gradient = divergence_of(name).closed_form(Softened.of(log_p), Softened.of(log_p.clone()))
    assert rows.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12
    assert divergence_of(name).dense(log_p, log_p.clone()).abs().max() < 1e-12


def divergence_across(name: str) -> AcrossDivergence:
    """Of nine tokens of the teacher's, some of which the student has, and eight of the student's; the last two are the same text."""
    none: Any = None
    teacher, student = ("a", "b", "ab", "c", "ca", "d", "", "abc", "e"), ("c", "b", "a", "d", "da", "", "ab", "a")
    vocabularies = Vocabularies(Spelling(none, teacher, {}), Spelling(none, student, {}), len(student))
    return ACROSS[name].divergence(ACROSS[name].section(), vocabularies)


def pass_across(name: str, impl: Impl, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    codec, every = made_codec(9), torch.ones(4, dtype=torch.bool)
    some = torch.tensor([True, False, True, True])
    whole = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 0]), torch.tensor([9, 9, 9, 9])
    aligned = AlignedRows(some, some, some, *whole, every.long())
    targets = OutputTargets(torch.tensor([1, IGNORE, 5, 0]), made_codes(codec, 4), codec, None, aligned)
    terms = [OutputTerm(divergence_across(name), 0.5, 2.0, weighted=False), OutputTerm(None, 0.5)]
    return output_loss(hidden, OutputHead(weight, None, 1.0, None), targets, terms, impl=impl)


@pytest.mark.parametrize("name", list(ACROSS))
def test_a_gradient_across_at_the_output_head_in_float64(name: str) -> None:
    inputs = drawn(4, 3), drawn(8, 3)
    assert torch.autograd.gradcheck(lambda hidden, weight: pass_across(name, "torch", hidden, weight)[0], inputs)


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "dense"])
@pytest.mark.parametrize("name", list(ACROSS))
def test_every_implementation_across_is_the_dense_one(name: str, impl: Impl) -> None:
    found = []
    ways: tuple[Impl, ...] = (impl, "dense")
    for way in ways:
        hidden, weight = drawn(4, 3), drawn(8, 3)
        total, rows = pass_across(name, way, hidden, weight)
        total.backward()
        found.append((total.detach(), rows.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def pass_of(names: Sequence[str], impl: Impl, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    codec = made_codec(9)
    targets = OutputTargets(
        torch.tensor([1, IGNORE, 5, 0]), made_codes(codec, 4), codec, torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=hidden.dtype)
    )
    terms = [OutputTerm(divergence_of(n), 0.5, 2.0) if n in DIVERGENCES else OutputTerm(None, 0.5) for n in names]
    return output_loss(hidden, OutputHead(weight, None, 1.0, None), targets, terms, impl=impl)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


@pytest.mark.parametrize("name", list(HEAD))
def test_its_gradient_at_the_output_head_in_float64(name: str) -> None:
    inputs = drawn(4, 3), drawn(9, 3)
    assert torch.autograd.gradcheck(lambda hidden, weight: pass_of([name], "torch", hidden, weight)[0], inputs)


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(HEAD))
def test_every_implementation_is_the_dense_one(name: str, impl: Impl, dtype: torch.dtype) -> None:
    found = []
    ways: tuple[Impl, ...] = (impl, "dense")
    for way in ways:
        hidden, weight = drawn(4, 3, dtype=dtype), drawn(9, 3, dtype=dtype)
        total, rows = pass_of([name], way, hidden, weight)
        total.backward()
        found.append((total.detach(), rows.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
