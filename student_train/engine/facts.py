"""What the planner looks at: a cache, a student, texts, a machine, the last evaluation."""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from model_taps.blocks import num_layers
from signal_store.cache import Cache
from signal_store.codecs.bf16_units import has_bf16_units
from signal_store.errors import InputError
from signal_store.signals.distribution import SCALARS
from student_train.data.sections import StreamSection
from student_train.engine.planner import CacheFacts, DataFacts, EvaluationFacts, Facts, HardwareFacts, StudentFacts
from student_train.losses.objective import refusals

ENTROPY_TOKENS = 16_384


def gather(
    cache: Cache, student: PreTrainedModel, stream: StreamSection, without: frozenset[str], evaluation: Path | None
) -> Facts:
    """All of them. `without`: terms that must stay off; `evaluation`: what `student-train fidelity --json` wrote, if anything."""
    return Facts(
        cache=cache_facts(cache),
        student=student_facts(cache, student),
        data=data_facts(cache),
        hardware=hardware_facts(),
        evaluation=None if evaluation is None else evaluation_facts(evaluation),
        sequence_length=stream.sequence_length,
        global_batch_rows=stream.global_batch_rows,
        without=without,
    )


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
