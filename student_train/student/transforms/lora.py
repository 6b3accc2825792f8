"""Low-rank adapters (LoRA, Hu et al. 2022), by peft: they are all that learns, and the result is the adapter's folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from model_taps.adapters import Adapter
from signal_store.errors import InputError
from signal_store.nearest import nearest
from student_train.student.sections import LoraSection
from student_train.student.transforms.transform import Origin


@dataclass(frozen=True, slots=True)
class Lora:
    """The transform that a section asks for: W becomes W + (alpha / rank) · B A, and only A and B learn."""

    section: LoraSection

    def __call__(self, student: PreTrainedModel, origin: Origin) -> PreTrainedModel:
        """New adapters, or those that the checkpoint is, which train on.

        Raises:
            InputError: if peft is missing, the student has no such module, or the checkpoint's adapters are others.
        """
        assert origin.checkpoint is not None, "adapters are trained on a checkpoint"
        torch.manual_seed(origin.seed)
        if origin.adapter is None:
            _add_adapters(student, self.section)
            _name_base(student, origin.checkpoint)
        else:
            _go_on_with(student, origin.adapter, self.section)
            _name_base(student, origin.adapter.base)
        return student


def _add_adapters(model: PreTrainedModel, section: LoraSection) -> None:
    """Low-rank adapters in place; all else is frozen."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("peft is not installed", expected='pip install "teacher-cache[lora]"', where="student.lora") from error
    targets = section.target_modules if isinstance(section.target_modules, str) else list(section.target_modules)
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if isinstance(targets, list) and (lost := [target for target in targets if target.rpartition(".")[2] not in modules]):
        where = "student.lora.target_modules"
        raise InputError("the student has no such module", expected=nearest(lost[0], modules), found=lost[0], where=where)
    model.add_adapter(
        LoraConfig(
            r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=targets, task_type="CAUSAL_LM"
        )
    )


def _go_on_with(model: PreTrainedModel, adapter: Adapter, section: LoraSection) -> None:
    """The checkpoint's own adapters, which train on. InputError where the section asks for others."""
    asked: dict[str, Any] = {"r": section.rank, "lora_alpha": section.alpha, "lora_dropout": section.dropout, "peft_type": "LORA"}
    if not isinstance(section.target_modules, str):
        asked["target_modules"] = sorted(section.target_modules)
    held: dict[str, Any] = {key: adapter.config.get(key) for key in asked}
    if isinstance(held.get("target_modules"), list):
        held["target_modules"] = sorted(held["target_modules"])
    if differ := {key for key in asked if held[key] != asked[key]}:
        raise InputError(
            "the checkpoint's adapters are others than student.lora asks for",
            expected={key: held[key] for key in sorted(differ)},
            found={key: asked[key] for key in sorted(differ)},
            where=adapter.name,
            remedy="Ask for the same, to train them on; or leave student.lora out, to train all of the merged student.",
        )
    model.load_adapter(adapter.name, is_trainable=True)


def _name_base(model: PreTrainedModel, base: str) -> None:
    """An exported adapter's base is found wherever it is read from: a folder by its absolute path."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
