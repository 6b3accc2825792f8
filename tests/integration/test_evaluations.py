"""Every evaluation has one shape: it says what it reads, gives the same numbers again, and leaves the student as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from signal_store.cache import Cache
from student_train.data.codecs import Codecs
from student_train.data.sections import StreamSection
from student_train.data.stream import Stream
from student_train.evaluate.cka import DepthCka
from student_train.evaluate.evaluation import LABELS, NATS, SHARE, Evaluation, numbers
from student_train.evaluate.gradient_shares import GradientShares
from student_train.evaluate.validation import Validation
from student_train.losses.objective import Objective, resolve
from student_train.losses.pairing import state_pairs
from student_train.losses.section import Losses
from student_train.model.distiller import Distiller
from student_train.model.parallel import ParallelModel, accelerator_of
from student_train.model.sections import ParallelSection
from tests.tiny import CONTEXT, make_model

TERMS: dict[str, Any] = {"forward_kl": {"temperature": 1.0}, "cross_entropy": {}, "residual_cka": {}}
Made = Callable[[Cache, Objective, Any], Evaluation]
EVALUATIONS: list[Made] = [
    lambda cache, _objective, _student: Validation(cache),
    lambda cache, _objective, _student: Validation(cache, with_teacher=False),
    lambda cache, _objective, student: DepthCka(cache, state_pairs("cka", DepthCka.tap, cache, student)),
    lambda _cache, objective, _student: GradientShares(objective, 0.5),
]


@pytest.mark.parametrize("make", EVALUATIONS, ids=["validation", "labels alone", "cka", "shares"])
def test_an_evaluation_changes_nothing_and_says_its_units(knowing_cache: Cache, make: Made) -> None:
    student = make_model("qwen3", knowing_cache.manifest.tokenizer.vocab_size, seed=7).train()
    objective = resolve(Losses.of(TERMS), knowing_cache, student)
    shared = ParallelModel.of(accelerator_of(bf16=False), Distiller(student, objective), ParallelSection())
    evaluation = make(knowing_cache, objective, student)
    shared.distiller.codecs = Codecs.of(knowing_cache, evaluation.needs, torch.device("cpu"))
    stream = Stream(knowing_cache, evaluation.needs, StreamSection(sequence_length=CONTEXT, global_batch_rows=4), packed=True)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    first, second = (evaluation.run(shared, stream.once("validation", evaluation.needs)) for _ in range(2))
    assert evaluation.name
    assert first == second
    assert first
    assert {quantity.unit for quantity in first.values()} <= {NATS, SHARE, LABELS}
    assert student.training
    assert all(parameter.grad is None for parameter in shared.distiller.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    if isinstance(evaluation, GradientShares):
        assert sum(numbers(first).values()) == pytest.approx(1)
    if isinstance(evaluation, Validation):
        assert ("kl" in first) is evaluation.with_teacher
