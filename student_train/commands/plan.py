"""plan: looks at cache, student, texts, machine and the last evaluation, and proposes an objective, a reason for each choice."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from model_taps.blocks import num_layers
from run_kit.command_line import check_target
from signal_store.cache import Cache, open_cache
from signal_store.codecs.bf16_units import has_bf16_units
from signal_store.errors import InputError
from signal_store.signals.distribution import SCALARS
from student_train.engine.planner import CacheFacts, Choice, DataFacts, EvaluationFacts, Facts, HardwareFacts, StudentFacts, propose
from student_train.losses import registry
from student_train.losses.objective import refusals
from student_train.recipe import RunRecipe
from student_train.student.build import build_student
from student_train.sweep_recipe import apply_value

ENTROPY_TOKENS = 16_384


class PlanRecipe(RunRecipe):
    """A run recipe that need not say what is optimised. Terms that it names and the planner does not decide stay as they are."""

    def _check_objective(self) -> None:
        """None is needed before the choices are made."""


def plan(recipe: PlanRecipe, evaluation: Path | None = None, write: Path | None = None) -> list[Choice]:
    """Propose an objective; nothing is applied.

    Args:
        evaluation: what `student-train fidelity --json` said of the last student.
        write: where the recipe that the choices make goes, as YAML.
    Returns:
        one choice for each question, with its reason.
    Raises:
        InputError: if the cache holds no distribution, or `evaluation` is none.
    """
    if write is not None:
        check_target(write)
    cache = open_cache(recipe.cache)
    student, _ = build_student(recipe.student, cache)
    choices = propose(
        Facts(
            cache=cache_facts(cache),
            student=student_facts(cache, student),
            data=data_facts(cache),
            hardware=hardware_facts(),
            evaluation=None if evaluation is None else evaluation_facts(evaluation),
            sequence_length=recipe.stream.sequence_length,
            global_batch_rows=recipe.stream.global_batch_rows,
            without=frozenset(name for name, kind in registry.kinds().items() if kind in recipe.without),
        )
    )
    if write is not None:
        write.write_text(yaml.safe_dump(planned_recipe(recipe, choices), sort_keys=False))
    return choices


def facts_of(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(choice) for choice in choices]


def text_of(choices: Sequence[Choice]) -> Table:
    """For a terminal: a row a choice."""
    table = Table("place", "value", "why")
    for choice in choices:
        shown = "off" if choice.value is None else "on" if choice.value == {} else json.dumps(choice.value)
        table.add_row(choice.place, escape(shown), escape(choice.why))
    return table


def planned_recipe(recipe: PlanRecipe, choices: list[Choice]) -> dict[str, Any]:
    """The run recipe that the choices make, as plain data."""
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True, exclude={"preset"})
    decided = {choice.place.removeprefix("losses.") for choice in choices}
    asked = content.get("losses") or {}
    content["losses"] = {name: options for name, options in asked.items() if name not in decided}
    for choice in choices:
        if choice.value is not None:
            name = choice.place.removeprefix("losses.")
            given = asked.get(name) if choice.value == {} else None
            apply_value(content, choice.place, given or choice.value)
    return content


def cache_facts(cache: Cache) -> CacheFacts:
    """From the manifest, and the teacher's entropy over the first tokens."""
    signal, calibration = cache.manifest.signals.distribution, cache.manifest.calibration
    vocabulary = math.log(cache.manifest.tokenizer.vocab_size)
    if signal is None:
        raise InputError(
            "the cache holds no distribution, so there is little to plan", expected="signals.distribution", where=cache.uri
        )
    scalars = cache.read("distribution/scalars", 0, min(ENTROPY_TOKENS, cache.manifest.plan.unit_tokens))
    entropy = float(np.nanmean(scalars[:, SCALARS.index("entropy")].astype(np.float64)))
    temperatures = dict(zip(signal.temperatures, calibration.coverage, strict=True))
    return CacheFacts(temperatures, calibration.tail_rank, entropy, vocabulary, "tags/roles" in cache.capacity_rows)


def student_facts(cache: Cache, student: PreTrainedModel) -> StudentFacts:
    """Its size, and what each term would be refused for."""
    teacher, width, layers = cache.manifest.teacher, int(student.config.get_text_config().hidden_size), num_layers(student)
    size = width**2 * layers / (teacher.hidden_size**2 * teacher.num_layers)
    parameters, frozen = (
        sum(p.numel() for p in student.parameters() if p.requires_grad in which) for which in ((True, False), (False,))
    )
    return StudentFacts(size, width, layers, parameters, frozen, refusals(cache, student))


def data_facts(cache: Cache) -> DataFacts:
    """Of the train sources."""
    sources = [source for source in cache.sources if source.split == "train"]
    return DataFacts(frozenset(source.task for source in sources if source.task is not None), len(sources))


def hardware_facts() -> HardwareFacts:
    """Of the machine that this runs on: its first GPU, or its memory."""
    if torch.cuda.is_available():
        return HardwareFacts("cuda", torch.cuda.get_device_properties(0).total_memory, torch.cuda.is_bf16_supported())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return HardwareFacts("cpu", memory, has_bf16_units())


def evaluation_facts(path: Path) -> EvaluationFacts:
    """What `student-train fidelity --json` wrote."""
    try:
        content = json.loads(path.read_text())
        return EvaluationFacts(
            **{name: float(content[name]) for name in ("kl", "teacher_entropy", "entropy_gap", "calibration_error")}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "not an evaluation", expected="what student-train fidelity --json writes", found=error, where=path
        ) from error
