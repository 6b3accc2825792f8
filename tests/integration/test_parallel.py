"""One student, several processes: replicated and sharded training give what one process gives, and go on in each other's place."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from signal_store.cache import Cache
from signal_store.errors import InputError
from student_train.commands.run import run
from student_train.losses import registry
from student_train.recipe import RunRecipe
from tests.processes import fresh
from tests.tiny import COMMON

ROWS = 4
EPS = 1e-3
"""Of Adam. Sums in another order differ by rounding, 1e-10 to 3e-7 of a gradient here. Adam divides by |gradient| + eps, so a step
multiplies that by up to learning rate / eps: 1e6 with eps 1e-8 (a first gradient of -4.71e-9 or -4.77e-9 moved one weight of 1,536
apart by 2.7e-5), 10 with this, which leaves the bound on weights to mean equal gradients."""


def recipe_of(cache: Cache, out: Path, **changes: Any) -> RunRecipe:
    content = {
        "cache": cache.uri,
        "out": out,
        "student": {"config": {"model_type": "llama", **COMMON, "num_hidden_layers": 2, "tie_word_embeddings": True}},
        "losses": {
            "forward_kl": {"temperature": 2.0},
            "cross_entropy": {"weight": 0.5},
            "lhsm": {},
            "apc": {"weight": 0.3},
            "asr": {},
        },
        "steps": 4,
        "precision": "float32",  # whatever this machine computes in natively: sums are compared
        "optimizer": {"learning_rate": 1e-2, "eps": EPS},
        "stream": {"sequence_length": 48, "global_batch_rows": ROWS, "workers": 0},
        "validation": {"every": 2},
        "checkpoint": {"every": 2, "keep": 9},
        **changes,
    }
    return RunRecipe.model_validate(content)


def work(rank: int, world: int, port: int, recipe: RunRecipe) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    run(recipe)


def together(recipe: RunRecipe, world: int = 2) -> None:
    """Run a recipe in this many gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fresh().Process(target=work, args=(rank, world, port, recipe)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records for name in ("loss", "validation_loss", "kl") if name in record]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def same_weights(out: Path, alone: Path) -> None:
    torch.testing.assert_close(weights(out), weights(alone), rtol=1e-4, atol=1e-5)


EVERYTHING: dict[str, Any] = {
    "forward_kl": {"temperature": 2.0},
    "cross_entropy": {"weight": 0.5},
    **{name: {"weight": 0.1} for name in registry.state_terms()},
    "gate": {},
    "parameter_anchor": {"weight": 0.1},
    "importance": {},
}
"""The objective that processes share in these tests: every term there is."""


def rich(cache: Cache, out: Path, **changes: Any) -> RunRecipe:
    return recipe_of(cache, out, losses=EVERYTHING, **changes)


@pytest.fixture(scope="module")
def cache(knowing_cache: Cache) -> Cache:
    return knowing_cache


@pytest.fixture(scope="module")
def alone(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run(rich(cache, out))
    return out


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_steps_equal_whole_ones(cache: Cache, alone: Path, tmp_path: Path, micro: int) -> None:
    run(rich(cache, tmp_path, stream={"sequence_length": 48, "global_batch_rows": ROWS, "workers": 0, "micro_batch_rows": micro}))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-6)
    same_weights(tmp_path, alone)


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_two_processes_equal_one(cache: Cache, alone: Path, tmp_path: Path, mode: str) -> None:
    together(rich(cache, tmp_path, parallel={"mode": mode}))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-6)
    same_weights(tmp_path, alone)
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 2


def test_another_number_of_processes_goes_on_at_the_same_place(cache: Cache, alone: Path, tmp_path: Path) -> None:
    recipe = rich(cache, tmp_path)
    together(recipe)
    (tmp_path / "result.json").unlink()
    for step in (3, 4):
        for file in (tmp_path / "checkpoints").glob(f"step-*{step}/*"):
            file.unlink()
    (tmp_path / "checkpoints" / "step-00000004").rmdir()
    run(recipe)  # from step 2, alone
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-6)


def test_activation_checkpointing_changes_nothing(cache: Cache, alone: Path, tmp_path: Path) -> None:
    run(rich(cache, tmp_path, activation_checkpointing=True))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-6)


def test_adapters_train_alone(cache: Cache, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**COMMON, "num_hidden_layers": 2, "vocab_size": cache.manifest.tokenizer.vocab_size})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "begun")
    out = tmp_path / "run"
    recipe = recipe_of(
        cache,
        out,
        student={"checkpoint": str(tmp_path / "begun"), "lora": {"rank": 2}},
        tensorboard=True,
    )
    run(recipe)
    found = load_file(out / "student" / "adapter_model.safetensors")
    assert found
    assert all("lora_" in name for name in found)
    assert losses(out)[-3] < losses(out)[0]
    assert list(out.rglob("events.out.tfevents*"))
    misspelt = recipe_of(
        cache, tmp_path / "b", student={"checkpoint": str(tmp_path / "begun"), "lora": {"target_modules": ["q_proj", "v_porj"]}}
    )
    with pytest.raises(InputError, match="no such module; expected v_proj; found v_porj"):
        run(misspelt)
