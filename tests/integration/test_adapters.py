"""Adapters as students and as teachers: rounds go on from them, merged or trained on, and their base is found and named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from model_taps.adapters import adapter_of
from model_taps.loading import load_config, load_model, load_tokenizer, weights_digest
from signal_store.cache import Cache
from signal_store.errors import InputError, NotFoundError
from student_train.commands.fidelity import fidelity_report
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from student_train.student.build import build_student
from student_train.student.sections import StudentSection
from teacher_cache.recipe import TeacherSection
from teacher_cache.teacher.load import load_teacher
from tests.integration.test_parallel import recipe_of
from tests.tiny import make_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 on transformers 5.23
IDS = torch.arange(1, 17)[None]
LORA = {"rank": 2, "alpha": 64}


@pytest.fixture(scope="module")
def vocab_size(cache: Cache) -> int:
    return cache.manifest.tokenizer.vocab_size


def round_of(cache: Cache, out: Path, **student: Any) -> RunRecipe:
    terms: dict[str, Any] = {"losses": {"cross_entropy": {}}, "steps": 2, "validation": None}
    return recipe_of(cache, out, student=student, **terms)


@pytest.fixture(scope="module")
def rounds(cache: Cache, vocab_size: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and a run of adapters on it whose recipe names it by a relative path."""
    folder = tmp_path_factory.mktemp("rounds")
    make_model("llama", vocab_size, num_hidden_layers=1).save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(round_of(cache, folder / "first", checkpoint="./base", lora=LORA))
    return folder


@torch.no_grad()
def logits(folder: Path | str) -> Tensor:
    """By peft itself, unmerged."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    found: Tensor = PeftModel.from_pretrained(base, folder).eval()(IDS).logits
    return found


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model.eval()(IDS).logits
    return found


def test_a_round_goes_on_from_adapters_all_of_it_or_the_adapters(cache: Cache, rounds: Path) -> None:
    first = rounds / "first" / "student"
    assert json.loads((first / "adapter_config.json").read_text())["base_model_name_or_path"] == str(rounds / "base")
    base = load_file(rounds / "base" / "model.safetensors")
    whole, _ = build_student(StudentSection(checkpoint=str(first)), cache)
    assert all(p.requires_grad for p in whole.parameters())
    torch.testing.assert_close(logits_of(whole), logits(first), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(whole), logits_of(load_model(str(rounds / "base"), what="model")), atol=1e-4)
    run(round_of(cache, rounds / "whole", checkpoint=str(first)))
    assert load_file(rounds / "whole" / "student" / "model.safetensors").keys() == base.keys()

    further, _ = build_student(StudentSection(checkpoint=str(first), lora=LORA), cache)
    trained = {name for name, p in further.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    torch.testing.assert_close(logits_of(further), logits(first), rtol=1e-4, atol=1e-5)
    run(round_of(cache, rounds / "further", checkpoint=str(first), lora=LORA))
    second = rounds / "further" / "student"
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(rounds / "base")
    assert not (second / "config.json").exists()
    assert not torch.allclose(logits(second), logits(first), atol=1e-5)
    with pytest.raises(InputError, match=r"adapters are others.*expected \{'r': 2\}; found \{'r': 4\}"):
        build_student(StudentSection(checkpoint=str(first), lora={**LORA, "rank": 4}), cache)
    assert fidelity_report(first, cache.uri, 50)["tokens"] > 0


def test_a_base_is_found_or_named(
    rounds: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a base may lie beside the folder that this process is in, too
    moved = tmp_path / "moved" / "adapter"
    shutil.copytree(rounds / "first" / "student", moved)
    shutil.copytree(rounds / "base", tmp_path / "moved" / "base")
    about = json.loads((moved / "adapter_config.json").read_text())

    def naming(base: str | None) -> str:
        (moved / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": base}))
        return str(moved)

    found = adapter_of(naming("../base"))
    assert found is not None
    assert found.base == str(tmp_path / "moved" / "base")
    assert load_config(str(moved), what="model").model_type == "llama"
    for file in moved.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(tmp_path / "moved" / "base")
    assert load_tokenizer(str(moved)).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(NotFoundError, match=r"the adapter's base is not there; expected ../nowhere"):
        load_model(naming("../nowhere"), what="student")
    with pytest.raises(InputError, match="names no base"):
        load_model(naming(None), what="student")
    shutil.copy(rounds / "base" / "config.json", moved)
    with pytest.raises(InputError, match="holds a model and an adapter"):
        load_model(naming("../base"), what="student")
    assert adapter_of(str(rounds / "base")) is None


def test_an_adapter_teaches_merged_and_is_both_its_digests(rounds: Path, vocab_size: int, tmp_path: Path) -> None:
    def taught(folder: Path) -> Any:
        section = TeacherSection(model=str(folder), dtype="float32", device="cpu")
        return load_teacher(section, vocab_size, capture_rows=False, needs_head=True)

    first = rounds / "first" / "student"
    teacher = taught(first)
    torch.testing.assert_close(logits_of(teacher.model), logits(first), rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in teacher.model.named_parameters())
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    assert taught(copy).identity.weights_digest == teacher.identity.weights_digest  # wherever it lies
    digests = {teacher.identity.weights_digest, weights_digest(load_model(str(rounds / "base"), what="model"))}
    about = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**about, "lora_alpha": 1}))
    digests.add(taught(copy).identity.weights_digest)
    make_model("llama", vocab_size, seed=1, num_hidden_layers=1).save_pretrained(tmp_path / "other")
    (copy / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": str(tmp_path / "other")}))
    digests.add(taught(copy).identity.weights_digest)
    assert len(digests) == 4
