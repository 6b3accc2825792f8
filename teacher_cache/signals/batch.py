"""One batch through the teacher and every signal's extractor: the rows it adds to its unit. And the rows that need no teacher."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from signal_store.errors import InputError
from signal_store.format.arrays import ArraySpec
from teacher_cache.signals.base import SampledExtractor, SignalExtractor
from teacher_cache.signals.calibrated import CalibratedTeacher
from teacher_cache.signals.extracted import Extracted, Rows, blanked, typed
from teacher_cache.signals.unit_work import SignalBatch, UnitWork
from teacher_cache.teacher.batches import TeacherBatch
from teacher_cache.teacher.forward import NO_PLACES, forward


def extract_batch(calibrated: CalibratedTeacher, work: UnitWork, batch: TeacherBatch) -> Extracted:
    """Forward pass and codes of one batch."""
    extractors = calibrated.extractors
    places = [work.once(extractor.attention_places) for extractor in extractors]
    rows = np.unique(np.concatenate([NO_PLACES, *places]))
    outputs = forward(calibrated.teacher, work.plan, batch, calibrated.tap_request, rows)
    seen = SignalBatch(work, batch, calibrated.teacher, outputs)
    specs = {spec.path: spec for spec in calibrated.manifest.specs}
    parts = []
    for extractor in extractors:
        found = extractor.extract(calibrated.prepared[extractor.name], seen)
        _refuse_other_rows(extractor, found.rows, specs, seen)
        if extractor.one_row_per_token:
            found = Extracted(blanked(found.rows, specs, seen.is_context), found.saturated)
        parts.append(found)
    return Extracted.joined(parts)


def _refuse_other_rows(
    extractor: SignalExtractor[Any, Any], rows: Rows, specs: Mapping[str, ArraySpec], batch: SignalBatch
) -> None:
    """InputError where an extractor gives rows for an array that its signal does not have, or not as many as the batch has: those
    that follow would lie at others' places."""
    sizes = {"token": len(batch.is_context), "segment": batch.num_segments}
    if extractor.one_row_per_token:
        sizes["row"] = sizes["token"]
    elif isinstance(extractor, SampledExtractor):
        sizes["row"] = int(batch.has(batch.work.once(extractor.positions)).sum())
    for path, array in rows.items():
        where = f"signals.{extractor.name}"
        if path not in specs:
            own = ", ".join(spec for spec in specs if spec.startswith(f"{extractor.name}/"))
            raise InputError("rows for an array that the signal does not have", expected=own or "none", found=path, where=where)
        axis = specs[path].dimension_names[0]
        if axis in sizes and len(array) != sizes[axis]:
            raise InputError(
                f"not a row for each {axis} of a batch", expected=sizes[axis], found=f"{len(array)} of {path}", where=where
            )


def plan_rows(calibrated: CalibratedTeacher, work: UnitWork) -> Rows:
    """The rows that need no teacher: tokens, segments, positions."""
    manifest = calibrated.manifest
    rows = {} if manifest.plan.overlay else dict(_text_rows(work, manifest.plan.unit_tokens))
    for extractor in calibrated.extractors:
        rows |= extractor.plan_rows(work, manifest)
    return typed(rows, {spec.path: spec for spec in manifest.specs})


def _text_rows(work: UnitWork, unit_tokens: int) -> Rows:
    """Tokens and segments."""
    unit = work.plan
    names = ("length", "context_only", "document", "source", "next_token", "token_hash", "finished")
    return {
        **{f"segments/{name}": getattr(unit, name) for name in names},
        "segments/token_start": unit.token_start + work.number * unit_tokens,
        **{f"tokens/{name}": getattr(unit, name) for name in ("input_ids", "loss_mask", "byte_end")},
    }
