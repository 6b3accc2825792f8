"""Every evaluation of a finished student against its cache, and how they are shown.

Agreement, overlap, KL, entropy gap and calibration error as `evaluate.fidelity` defines them; and, where the cache holds
blocks' outputs, their debiased linear CKA with the student's at the same depth, mean over segments.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from signal_store.cache import Cache, open_cache
from signal_store.errors import MismatchError
from student_train.align.aligned_cache import AlignedCache, longest_segment
from student_train.align.view import View
from student_train.data.codecs import Codecs
from student_train.data.sections import StreamSection
from student_train.data.stream import Stream
from student_train.evaluate.cka import DepthCka
from student_train.evaluate.evaluation import Evaluation, Quantity, numbers
from student_train.evaluate.validation import Validation
from student_train.losses.objective import Objective
from student_train.losses.pairing import state_pairs
from student_train.losses.section import Losses
from student_train.model.distiller import Distiller
from student_train.model.parallel import ParallelModel, accelerator_of
from student_train.model.sections import ParallelSection
from student_train.student.build import build_student
from student_train.student.packing import packs_rows
from student_train.student.sections import StudentSection

ROWS = 4
"""Of a forward pass, each as long as the longest segment."""


def facts_of(found: Mapping[str, Mapping[str, Quantity]]) -> dict[str, Any]:
    """The numbers alone, as JSON and `plan --evaluation` have them."""
    kept: dict[str, Any] = dict(numbers(found["validation"]))
    kept["tokens"] = kept.pop("validation_tokens")
    return {**kept, "cka": numbers(found.get("cka", {}))}


def evaluated(
    student: Path, cache: str | tuple[str, ...], max_tokens: int | None, *, bf16: bool, view: str | None = None
) -> dict[str, dict[str, Quantity]]:
    """By evaluation, its numbers with their units. `view`: of the cache, for a student with another tokenizer."""
    opened = open_cache(cache)
    opened = opened if view is None else AlignedCache(opened.parts, View.open(view))
    if opened.manifest.signals.distribution is None:
        raise MismatchError("the cache holds no distribution to compare with", expected="signals.distribution", where=opened.uri)
    if not len(opened.units("validation")):
        raise MismatchError("the cache has no validation split", expected="a source with split: validation", where=opened.uri)
    parallel = _parallel_student(student, opened, bf16=bf16)
    validation = Validation(opened)
    parallel.distiller.codecs = Codecs.of(opened, validation.needs, parallel.accelerator.device)
    rows = StreamSection(sequence_length=longest_segment(opened), global_batch_rows=ROWS)
    with parallel.accelerator.autocast():
        packed = packs_rows(parallel.distiller.student, opened, rows.sequence_length, rows.forward_rows)
    stream = Stream(opened, validation.needs, rows, packed=packed)
    evaluations: list[Evaluation] = [validation, *_cka(opened, parallel)]
    return {each.name: each.run(parallel, stream.once("validation", each.needs, max_tokens)) for each in evaluations}


def text_of(found: Mapping[str, Mapping[str, Quantity]]) -> str:
    """For a terminal: a line a number, with its unit."""
    labels = {"validation_tokens": "tokens"}
    lines = [(labels.get(name, name), quantity) for name, quantity in found["validation"].items()]
    lines += [(f"CKA of teacher's block / student's at its depth, {pair}", mean) for pair, mean in found.get("cka", {}).items()]
    return "\n".join(f"{name}: {_shown(quantity)}" for name, quantity in lines)


def _shown(quantity: Quantity) -> str:
    value = f"{quantity.value:,}" if isinstance(quantity.value, int) else f"{quantity.value:.4f}"
    return f"{value} {quantity.unit}".rstrip()


def _parallel_student(student: Path, cache: Cache, *, bf16: bool) -> ParallelModel:
    model, _ = build_student(StudentSection(checkpoint=str(student)), cache)
    accelerator = accelerator_of(bf16=bf16)
    distiller = Distiller(model, Objective(Losses.of({}), {})).to(accelerator.device)
    return ParallelModel.of(accelerator, distiller, ParallelSection())


def _cka(cache: Cache, parallel: ParallelModel) -> list[DepthCka]:
    """Where the cache holds outputs of blocks."""
    if not any(held.tap == DepthCka.tap for held in cache.manifest.calibration.hidden):
        return []
    return [DepthCka(cache, state_pairs("cka", DepthCka.tap, cache, parallel.distiller.student))]
