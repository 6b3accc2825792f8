"""The gate over the temporal terms: undecided it changes nothing, it never leaves one alone, and it goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signal_store.cache import Cache
from signal_store.format.roles import TOKEN_TYPES
from student_train.commands.run import run
from student_train.losses.gate import FEATURES, Gate, GateSection, repeated
from student_train.losses.temporal import TokenLosses
from student_train.recipe import RunRecipe
from tests.integration.test_terms import alone
from tests.tiny import CONTEXT, make_model

LEVELS: dict[str, Any] = {"smoothness": {}, "attention_evolution": {}, "replay": {}}


def test_an_undecided_gate_changes_nothing(knowing_cache: Cache) -> None:
    gradients = []
    for losses in ({"forward_kl": {}, **LEVELS}, {"forward_kl": {}, **LEVELS, "gate": {}}):
        student = make_model("qwen3", knowing_cache.manifest.tokenizer.vocab_size, seed=7)
        distiller, objective, batch = alone(student, knowing_cache, {**losses, "forward_kl": {"temperature": 1.0}})
        total, sums = distiller(batch, {name: 1 / count for name, count in objective.counts(batch).items()})
        total.backward()
        distiller.close_taps()
        gradients.append({n: p.grad for n, p in student.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert sums["gate_weights"].shape == (3, len(TOKEN_TYPES), 2)
    weight, tokens = sums["gate_weights"].sum((0, 1)).tolist()
    assert tokens / 3 < weight < tokens  # most tokens are of one level alone


def test_it_looks_at_more_than_ten_things_that_differ(knowing_cache: Cache) -> None:
    assert len(FEATURES) >= 12
    student = make_model("qwen3", knowing_cache.manifest.tokenizer.vocab_size, seed=7)
    objective = {"forward_kl": {"temperature": 1.0}, "cross_entropy": {}, **LEVELS, "gate": {}, "importance": {}}
    distiller, resolved, batch = alone(student, knowing_cache, objective)
    assert resolved.gate is not None
    tables = []
    original = resolved.gate.features
    resolved.gate.features = lambda *given: tables.append(original(*given)) or tables[-1]  # type: ignore[method-assign, func-returns-value]
    distiller(batch, dict.fromkeys(resolved.counts(batch), 1.0))
    distiller.close_taps()
    seen = tables[0][batch.flat]
    flat = [name for name, column in zip(FEATURES, seen.T, strict=True) if column.std() == 0]
    assert set(flat) <= {"function", "anchor"}, flat  # the cache holds code only
    assert seen.isfinite().all()
    assert seen.abs().max() < 25


@given(loss=st.floats(0, 1e6), seed=st.integers(0, 50))
def test_no_level_is_left_alone(knowing_cache: Cache, loss: float, seed: int) -> None:
    gate = Gate(GateSection(floor=0.05), ["a", "b", "c"], knowing_cache)
    torch.manual_seed(seed)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=5)
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]], dtype=torch.bool)
    weights = gate.weights(loss * torch.randn(6, len(FEATURES)), present)
    assert weights[present].min() >= 0.05 - 1e-6
    assert (weights[~present] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert weights[2, 1] == 1


def looked_at(cache: Cache) -> tuple[Gate, Any, Any, Any]:
    """A gate that has seen losses of 1, its batch, and what it was given of it: losses of rows, and what the step saw."""
    torch.manual_seed(0)
    student = make_model("qwen3", cache.manifest.tokenizer.vocab_size, seed=7)
    distiller, objective, batch = alone(student, cache, {"forward_kl": {"temperature": 1.0}, **LEVELS, "gate": {}})
    gate = objective.gate
    assert gate is not None
    gate.observe(dict.fromkeys(gate.levels, 1.0))
    seen: list[Any] = []
    fuse = gate.fuse
    gate.fuse = lambda *given: seen.append(given) or fuse(*given)  # type: ignore[method-assign, func-returns-value]
    distiller(batch, dict.fromkeys(objective.counts(batch), 1.0))
    distiller.close_taps()
    gate.fuse = fuse  # type: ignore[method-assign]
    _, rows, looked = seen[0]
    return gate, batch, rows, looked


def test_it_turns_from_what_stays_large_but_not_to_zero(knowing_cache: Cache) -> None:
    gate, batch, rows, looked = looked_at(knowing_cache)
    planted = {
        name: TokenLosses(batch.flat, torch.full((len(batch.flat),), size))
        for name, size in zip(gate.levels, (0.1, 1e6, 0.1), strict=True)
    }
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (gate.fuse(planted, rows, looked).own / (3 * len(batch.flat))).backward()
        optimizer.step()
    table = gate.features(rows, looked)[batch.flat]
    weights = gate.weights(table, torch.ones(len(table), 3, dtype=torch.bool)).mean(0)
    assert 0.05 <= weights[1] < 0.1
    assert (weights[[0, 2]] > 0.3).all()


def test_a_level_that_is_absent_draws_no_weight(knowing_cache: Cache) -> None:
    """Every loss at its mean: nothing to prefer, and nothing is preferred, though replay is at few tokens."""
    gate, batch, rows, looked = looked_at(knowing_cache)
    places = dict(zip(gate.levels, (batch.flat, batch.flat[::10], batch.flat[::40]), strict=True))
    planted = {name: TokenLosses(flat, torch.ones(len(flat))) for name, flat in places.items()}
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (gate.fuse(planted, rows, looked).own / len(batch.flat)).backward()
        optimizer.step()
    fused = gate.fuse(planted, rows, looked)
    for name, flat in places.items():
        assert float(fused.weighted[name].detach()) == pytest.approx(len(flat), rel=0.05), name


def recipe(cache: Cache, out: Path, **changes: Any) -> RunRecipe:
    content: dict[str, Any] = {
        "cache": cache.uri,
        "out": out,
        "student": {"checkpoint": cache.manifest.teacher.name},
        "losses": {"forward_kl": {"temperature": 1.0}, **LEVELS, "gate": {"width": 8}},
        "steps": 4,
        "stream": {"sequence_length": CONTEXT, "global_batch_rows": 8, "workers": 0},
        "checkpoint": {"every": 2, "keep": 5},
        "optimizer": {"learning_rate": 1e-3},
    }
    return RunRecipe.model_validate({**content, **changes})


def test_it_is_deterministic_checkpointed_and_logged_by_token_type(knowing_cache: Cache, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(recipe(knowing_cache, first))
    run(recipe(knowing_cache, second))
    (second / "result.json").unlink()
    for file in (second / "checkpoints" / "step-00000004").iterdir():
        file.unlink()
    (second / "checkpoints" / "step-00000004").rmdir()
    run(recipe(knowing_cache, second))
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if "seconds" not in k}
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in (first, second)
    ]
    assert logs[0][-1] == logs[1][-1]
    assert {name for name in logs[0][-1] if name.startswith("gate/")} >= {"gate/smoothness/code", "gate/replay/code"}
    assert (first / "student" / "model.safetensors").read_bytes() == (second / "student" / "model.safetensors").read_bytes()


def test_repetition() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 9, 1, 2, 3, 4, 1, 2, 3, 4]])
    segment = torch.tensor([[0] * 9 + [1] * 4])
    positions = torch.tensor([[*range(9), *range(4)]])
    assert repeated(ids, segment, positions).nonzero()[:, 1].tolist() == [8]
