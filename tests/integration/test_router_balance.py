"""A mixture of experts keeps the loss that its own forward pass adds: the same value, without filler, with a gradient; or is refused."""

import functools
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError
from student_train.commands.explain import explain
from student_train.commands.run import run
from student_train.data.batch import CodedBatch
from student_train.data.request import TOKENS_ONLY
from student_train.data.sections import StreamSection
from student_train.data.stream import Stream
from student_train.losses.objective import resolve
from student_train.losses.router_balance import family_balance, refuse_lost_losses
from student_train.losses.section import Losses
from student_train.model.distiller import Distiller
from student_train.recipe import RunRecipe
from tests.integration.test_parallel import losses, recipe_of
from tests.tiny import COMMON

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
SWITCHED_ON: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}


def fields(family: str, **changes: Any) -> dict[str, Any]:
    return {**COMMON, **EXPERTS[family], **SWITCHED_ON, "num_hidden_layers": 2, **changes}


def student_of(family: str, cache: Cache, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=cache.manifest.tokenizer.vocab_size, **fields(family, **changes))
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.eval()
    return made


def batch_of(cache: Cache) -> CodedBatch:
    """Packed rows with filler at their ends."""
    section = StreamSection(sequence_length=112, global_batch_rows=3, workers=0)
    return next(iter(Stream(cache, TOKENS_ONLY, section, packed=True).micro_batches({}, 0)))


def sums_of(student: PreTrainedModel, cache: Cache, batch: CodedBatch, **scales: float) -> tuple[Tensor, dict[str, Tensor]]:
    objective = resolve(Losses.of({"cross_entropy": {}}), cache, student)
    total, sums = Distiller(student, objective)(batch, {"cross_entropy": 0.0, **scales})
    return total, sums


@pytest.mark.parametrize("family", list(EXPERTS))
def test_it_is_the_familys_own_and_filler_takes_no_part(cache: Cache, family: str) -> None:
    student = student_of(family, cache)
    batch = batch_of(cache)
    assert 0 < batch.real.sum() < batch.real.numel()
    _, sums = sums_of(student, cache, batch, router_balance=1.0)
    ours = float(sums["router_balance"]) / float(batch.real.sum())
    assert len(batch.segments) > 3
    own = importlib.import_module(type(student).__module__).load_balancing_loss_func
    with torch.no_grad():
        ids = [torch.from_numpy(cache[n].input_ids.astype("int64"))[None] for n in batch.segments]
        apart = [student(input_ids=one, use_cache=False).router_logits for one in ids]
        by_layer = tuple(torch.cat(layers) for layers in zip(*apart, strict=True))
        assert ours == pytest.approx(float(own(by_layer, 4, 2)), rel=1e-5)
        with_filler = student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        balance = family_balance(student)
        assert balance is not None
        everything = float(balance(with_filler.router_logits, torch.ones_like(batch.input_ids))) / batch.input_ids.numel()
        assert everything == pytest.approx(float(with_filler.aux_loss), rel=1e-6)
        assert everything != pytest.approx(ours, rel=1e-4)


@pytest.mark.parametrize("family", list(EXPERTS))
def test_its_gradient_reaches_the_routers_alone(cache: Cache, family: str) -> None:
    student = student_of(family, cache)
    total, _ = sums_of(student, cache, batch_of(cache), router_balance=1.0)
    total.backward()
    gates = [p.grad for name, p in student.named_parameters() if "gate.weight" in name]
    assert len(gates) == 2
    assert all(grad is not None and grad.abs().max() > 0 for grad in gates)
    assert student.get_output_embeddings().weight.grad is None or not student.get_output_embeddings().weight.grad.any()


def moe_run(cache: Cache, out: Path, family: str = "mixtral", config: dict[str, Any] | None = None, **changes: Any) -> RunRecipe:
    student = {"config": {"model_type": family, **fields(family, num_hidden_layers=1, **(config or {}))}}
    content: dict[str, Any] = {"losses": {"cross_entropy": {}}, "student": student, "steps": 2, "validation": None, **changes}
    return recipe_of(cache, out, **content)


def test_the_coefficient_counts_and_0_is_off_bit_for_bit(cache: Cache, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "on": {},
        "micro": {"stream": {"sequence_length": 48, "global_batch_rows": 4, "workers": 0, "micro_batch_rows": 1}},
        "checkpointed": {"activation_checkpointing": True},
        "zero": {"config": {"router_aux_loss_coef": 0.0}},
        "no logits": {"config": {"output_router_logits": False}},
        "null": {"losses": {"cross_entropy": {}, "router_balance": None}},
        "by the recipe": {
            "config": {"output_router_logits": False},
            "losses": {"cross_entropy": {}, "router_balance": {"weight": 0.5}},
        },
    }
    for name, changes in ways.items():
        run(moe_run(cache, tmp_path / name, **changes))
    found = {name: load_file(tmp_path / name / "student" / "model.safetensors") for name in ways}

    def same(one: str, other: str) -> bool:
        return all(torch.equal(value, found[other][name]) for name, value in found[one].items())

    assert same("zero", "no logits")
    assert same("zero", "null")
    assert same("on", "by the recipe")
    assert not same("on", "zero")
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "on"), rel=1e-6)
    assert losses(tmp_path / "micro") == pytest.approx(losses(tmp_path / "on"), rel=2e-2)
    log = (tmp_path / "on" / "metrics.jsonl").read_text()
    assert '"router_balance_loss"' in log
    assert '"router_balance_weight": 0.5' in log
    assert "router_balance" not in (tmp_path / "zero" / "metrics.jsonl").read_text()


def test_explain_says_it(cache: Cache, tmp_path: Path) -> None:
    (term,) = [t for t in explain(moe_run(cache, tmp_path / "x"))["terms"] if t["term"] == "router_balance"]
    assert (term["weight"], term["source"], term["taps"]) == ("0.5", "the student's config", ["routers of its experts"])
    off = explain(moe_run(cache, tmp_path / "x", config={"output_router_logits": False}))["off"]
    assert [o["why"] for o in off if o["term"] == "router_balance"] == [
        "output_router_logits of the student's config; its coefficient there is 0.5"
    ]


def test_a_loss_that_is_not_known_is_refused_by_name(cache: Cache, tmp_path: Path) -> None:
    none_known = {"losses": {"cross_entropy": {}, "router_balance": {"weight": 0.1}}}
    with pytest.raises(MismatchError, match=r"router_balance: the student's family has no such loss.*found llama"):
        run(recipe_of(cache, tmp_path / "x", **none_known))
    vocab_size = cache.manifest.tokenizer.vocab_size
    student = student_of("qwen3_moe", cache)
    refuse_lost_losses(student, vocab_size, family_balance(student))
    own = type(student).forward

    class Zealous(type(student)):  # type: ignore[misc]
        @functools.wraps(own)
        def forward(self, *args: Any, **options: Any) -> Any:
            found = own(self, *args, **options)
            found.loss = None if found.loss is None else found.loss + 1e-3 * found.logits.logsumexp(-1).square().mean()
            return found

    student.__class__ = Zealous
    Zealous.__module__ = own.__module__
    with pytest.raises(InputError, match=r"adds a loss of its own.*cross-entropy and 1.*Zealous"):
        refuse_lost_losses(student, vocab_size, family_balance(student))
    with pytest.raises(InputError, match=r"adds a loss of its own.*Zealous"):
        refuse_lost_losses(student, vocab_size, None)
    other = student_of("mixtral", cache)
    balance = family_balance(other)
    assert balance is not None
    with pytest.raises(MismatchError, match=r"routers do not give what its family's loss needs.*by the family itself"):
        refuse_lost_losses(other, vocab_size, replace(balance, top_k=1))
