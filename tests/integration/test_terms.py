"""Every term on a cache that holds every signal: nothing to learn where the student is its teacher, each on its own, none lost."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model_taps.loading import load_model
from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.collate import collate
from student_train.data.sections import StreamSection
from student_train.data.stream import Stream
from student_train.losses import registry
from student_train.losses.objective import Objective, resolve
from student_train.losses.section import Losses
from student_train.model.distiller import Distiller
from tests.tiny import COMMON, CONTEXT, make_model

ZERO = {name: term.residue for name, term in registry.state_terms().items() if term.residue is not None}
"""What is left of a term where the student is its teacher: the codecs' rounding. The others have a floor of their own: `asr` and
`input_reconstruction` (1 for a head that has learned nothing)."""


def alone(model: PreTrainedModel, cache: Cache, losses: dict[str, Any]) -> tuple[Distiller, Objective, CodedBatch]:
    torch.manual_seed(0)
    objective = resolve(Losses.of(losses), cache, model)
    distiller = Distiller(model, objective)
    distiller.codecs = Codecs.of(cache, objective.needs, torch.device("cpu"))
    section = StreamSection(sequence_length=CONTEXT, global_batch_rows=16)
    stream = Stream(cache, objective.needs, section, packed=True, token_weights=objective.token_weights)
    batch = next(stream.micro_batches({}, 0))
    if objective.matched_layers:
        assert distiller.choose_heads(batch)
    return distiller, objective, batch


def means_of(distiller: Distiller, objective: Objective, batch: CodedBatch) -> dict[str, float]:
    counts = objective.counts(batch)
    assert all(counts.values()), counts
    total, sums = distiller(batch, {name: 1 / count for name, count in counts.items()})
    total.backward()
    distiller.close_taps()
    return {name: float(value) / counts[name] for name, value in sums.items()}


def everything(names: Iterable[str]) -> dict[str, Any]:
    return {name: {} for name in names}


@pytest.fixture
def teacher(knowing_cache: Cache) -> PreTrainedModel:
    return load_model(knowing_cache.manifest.teacher.name, what="teacher", dtype=torch.float32)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(knowing_cache: Cache, teacher: PreTrainedModel) -> None:
    found = means_of(*alone(teacher, knowing_cache, everything(registry.state_terms())))
    for name, bound in ZERO.items():
        assert 0 <= found[name] + 1e-6 <= bound + 1e-6, (name, found[name])
    assert found.keys() - ZERO.keys() == {"asr", "input_reconstruction"}
    assert 0.5 < found["input_reconstruction"] < 3


def test_another_student_has_and_each_term_stands_alone(knowing_cache: Cache) -> None:
    student = make_model("qwen3", knowing_cache.manifest.tokenizer.vocab_size, seed=7)
    together = means_of(*alone(student, knowing_cache, everything(registry.state_terms())))
    for name in registry.state_terms():
        student.zero_grad()
        distiller, objective, batch = alone(student, knowing_cache, {name: {}})
        mean = means_of(distiller, objective, batch)
        assert mean.keys() == {name}
        if name != "input_reconstruction":  # its head is drawn anew
            assert mean[name] == pytest.approx(together[name], rel=1e-4, abs=1e-7), name
        assert mean[name] > 5 * ZERO.get(name, 0), (name, mean[name])
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert gradients, name
        assert all(g.isfinite().all() for g in gradients), name
        assert sum(float(g.abs().sum()) for g in gradients) > 0, name


def test_a_student_of_other_widths_and_depth_learns_from_every_term(knowing_cache: Cache) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", **{**COMMON, **shape}, vocab_size=knowing_cache.manifest.tokenizer.vocab_size)
    student = AutoModelForCausalLM.from_config(config)
    found = means_of(*alone(student, knowing_cache, everything(registry.state_terms())))
    assert found.keys() == registry.state_terms().keys()
    assert all(value > 0 for value in found.values()), found
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_a_batch_without_anything_has_a_gradient_of_zero(knowing_cache: Cache) -> None:
    student = make_model("llama", knowing_cache.manifest.tokenizer.vocab_size, seed=7)
    distiller, objective, _batch = alone(student, knowing_cache, everything(registry.state_terms()))
    stream = Stream(knowing_cache, objective.needs, StreamSection(sequence_length=CONTEXT, global_batch_rows=2), packed=True)
    empty = collate([[], []], stream.config.sequence_length, objective.needs, packed=True, cursor={})
    counts = objective.counts(empty)
    assert not any(counts.values())
    total, sums = distiller(empty, dict.fromkeys(counts, 1.0))
    total.backward()
    distiller.close_taps()
    assert all(float(value) == 0 for value in sums.values()), sums
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().max() == 0, name
    assert all(p.grad is not None for n, p in distiller.named_parameters() if n.startswith("terms.")), "every parameter joins"


def test_sparsity_asks_for_the_teachers_and_no_more(knowing_cache: Cache, teacher: PreTrainedModel) -> None:
    relative = {"asr": {"relative": True}}
    assert means_of(*alone(teacher, knowing_cache, relative))["asr"] < 1e-3
    dense = make_model("llama", knowing_cache.manifest.tokenizer.vocab_size, seed=7)
    for parameter in dense.model.layers.parameters():  # an FFN whose units all say the same is not sparse at all
        torch.nn.init.constant_(parameter, 0.01)
    assert means_of(*alone(dense, knowing_cache, relative))["asr"] > 0.1
