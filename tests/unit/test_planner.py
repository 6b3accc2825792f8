"""The planner: each of its five inputs changes the choices that rest on it, and no other."""

from dataclasses import replace
from typing import Any

from student_train.engine.planner import CacheFacts, DataFacts, EvaluationFacts, Facts, HardwareFacts, StudentFacts, propose
from student_train.losses.section import Losses

FACTS = Facts(
    cache=CacheFacts({1.0: 0.95, 2.0: 0.7, 3.0: 0.4}, 64, 2.0, 9.0, has_tags=True),
    student=StudentFacts(0.5, 512, 8, 30_000_000),
    data=DataFacts(frozenset({"qa", "summary"}), 3),
    hardware=HardwareFacts("cuda", 40 * 2**30, bfloat16=True),
    evaluation=None,
    sequence_length=1024,
    global_batch_rows=32,
)
LAST = EvaluationFacts(kl=0.5, teacher_entropy=2.0, entropy_gap=0.0, calibration_error=0.02)


def chosen(facts: Facts) -> dict[str, Any]:
    choices = propose(facts)
    assert all(choice.why for choice in choices)
    assert len({choice.place for choice in choices}) == len(choices)
    return {choice.place: choice.value for choice in choices}


def changed(facts: Facts, base: Facts = FACTS) -> dict[str, Any]:
    before, after = chosen(base), chosen(facts)
    return {place: after.get(place) for place in before.keys() | after.keys() if before.get(place) != after.get(place)}


def test_the_first_proposal_is_an_objective() -> None:
    found = chosen(FACTS)
    losses = {
        place.removeprefix("losses."): value for place, value in found.items() if place.startswith("losses.") and value is not None
    }
    assert not Losses.of(losses).empty_kinds()
    assert found["losses.forward_kl"] == {"temperature": 1.0}
    assert found["losses.cross_entropy"] is None
    assert found["losses.gate"] == {}
    assert found["precision"] == "bfloat16"
    assert found["stream.micro_batch_rows"] is None


def test_the_cache() -> None:
    unsure = replace(FACTS, cache=replace(FACTS.cache, entropy=6.0, has_tags=False))
    assert changed(unsure) == {"losses.cross_entropy": {"weight": 0.5}, "losses.importance": None}


def test_the_student() -> None:
    small = replace(FACTS, student=replace(FACTS.student, size=0.1))
    assert changed(small) == {"losses.forward_kl": None, "losses.jsd": {"temperature": 1.0}}
    recurrent = dict.fromkeys(
        ("apc", "attention_statistics", "attention_evolution", "evidence"), "the student has no softmax attention"
    )
    found = changed(replace(FACTS, student=replace(FACTS.student, refused=recurrent)))
    assert found == dict.fromkeys(("losses.attention_statistics", "losses.attention_evolution", "losses.evidence"))
    frozen = replace(FACTS.student, parameters=3_000_000_000, frozen=2_990_000_000)
    assert not changed(replace(FACTS, student=frozen)).get("activation_checkpointing")
    one_left = dict.fromkeys(("smoothness", "replay"), "not cached")
    assert changed(replace(FACTS, student=replace(FACTS.student, refused=one_left)))["losses.gate"] is None


def test_what_the_recipe_leaves_out_stays_out() -> None:
    found = changed(replace(FACTS, without=frozenset({"forward_kl", "cross_entropy"})))
    assert found == {"losses.forward_kl": None, "losses.importance": None}


def test_the_texts() -> None:
    assert changed(replace(FACTS, data=DataFacts(frozenset({"qa"}), 3))) == {"losses.coverage": None}
    assert changed(replace(FACTS, data=DataFacts(frozenset(), 1))) == {"losses.evidence": None, "losses.coverage": None}


def test_the_machine() -> None:
    assert changed(replace(FACTS, hardware=HardwareFacts("cpu", 40 * 2**30, bfloat16=False))) == {"precision": "float32"}
    tight = changed(replace(FACTS, hardware=HardwareFacts("cuda", 2**30, bfloat16=True)))
    assert tight == {"stream.micro_batch_rows": 2}
    tiny = changed(replace(FACTS, hardware=HardwareFacts("cuda", 700 * 2**20, bfloat16=True)))
    assert tiny["activation_checkpointing"] is True
    none = replace(FACTS, hardware=HardwareFacts("cuda", 100 * 2**20, bfloat16=True))
    assert any("sharded" in choice.why for choice in propose(none))


def test_the_last_evaluation() -> None:
    base = replace(FACTS, evaluation=LAST)
    assert not changed(base)
    sure = replace(FACTS, evaluation=replace(LAST, entropy_gap=-0.6))
    assert changed(sure) == {"losses.forward_kl": {"temperature": 2.0}}
    one_temperature = replace(sure, cache=replace(FACTS.cache, temperatures={1.0: 0.95}))
    assert not changed(one_temperature, replace(one_temperature, evaluation=LAST))
    no_tail = replace(sure, cache=replace(FACTS.cache, tail_rank=0))
    assert not changed(no_tail, replace(no_tail, evaluation=LAST))
    assert changed(replace(FACTS, evaluation=replace(LAST, calibration_error=0.3))) == {"losses.cross_entropy": {"weight": 0.2}}
    learned = changed(replace(FACTS, evaluation=replace(LAST, kl=0.01)))
    features = ("attention_direction", "normalised_direction", "activation_mmd", "input_reconstruction", "residual_cka")
    assert learned == {f"losses.{name}": None for name in features}
