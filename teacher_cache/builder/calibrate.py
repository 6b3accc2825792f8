"""calibrate: fix what depends on the teacher (`calibration_fit`). Then the layout is known and the manifest is frozen. The first to
commit wins; every worker recomputes one segment and compares."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from model_taps.machine import MachineClass, differences
from model_taps.native_dtype import AUTO
from model_taps.neighbours import Composition
from run_kit.progress import tell
from signal_store.canonical import sha256
from signal_store.errors import CorruptError, MismatchError
from signal_store.format.arrays import ArraySpec
from signal_store.format.text import segment_arrays, token_arrays
from signal_store.io.objects import Objects
from signal_store.ledger.documents import CALIBRATION, MANIFEST, calibration_keys, commit, new_attempt, read_document
from signal_store.manifest import (
    FORMAT_VERSION,
    CalibrationIdentity,
    Manifest,
    PlanIdentity,
    SourceIdentity,
    TeacherIdentity,
    TokenizerIdentity,
    parse_manifest,
)
from signal_store.signals import AttentionLayout, Dimensions, HiddenLayout, Signal, StatsLayout
from teacher_cache.builder.calibration_fit import Arrays, checked_values, measure
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.recipe_parts import calibrated_part, completed_calibration, refuse_another_recipe
from teacher_cache.builder.worker_notes import noted
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.calibrated import CalibratedTeacher
from teacher_cache.signals.limits import refuse_beyond_teacher
from teacher_cache.signals.registry import extractors_of
from teacher_cache.teacher.batches import TeacherBatch, compose
from teacher_cache.teacher.dtype import tell_of_emulation, with_dtype
from teacher_cache.teacher.forward import forward
from teacher_cache.teacher.identity import differing_fields, refuse_another_teacher, refuse_another_than_the_base
from teacher_cache.teacher.load import Teacher, load_teacher, placed
from teacher_cache.worker import ALONE, Worker

CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Calibrated(CalibratedTeacher):
    """And the plan that it was calibrated on."""

    plan: Plan


def calibrate_planned(recipe: CacheRecipe, planned: Plan, objects: Objects, worker: Worker = ALONE) -> Calibrated:
    """Calibrate the settled recipe of a plan, or take the calibration that stands; MismatchError if another teacher or recipe of
    signals made it. Where a machine of another class settles the dtype of `auto` first, the teacher of the first try is gone before
    the second is loaded."""
    while (found := _calibrated(recipe, planned, objects, worker)) is None:
        pass
    return found


def _calibrated(wanted: CacheRecipe, planned: Plan, objects: Objects, worker: Worker) -> Calibrated | None:
    """One try, in the dtype that this machine takes for `auto` where none stands yet; None where another one stands at its end."""
    recipe, reason = with_dtype(wanted, objects, worker.local)
    tell_of_emulation(recipe, reason, worker.local)
    teacher = load_recipe_teacher(recipe, planned.vocab_size, worker)
    if recipe.base is not None:
        refuse_another_than_the_base(recipe.base, teacher.identity)
    machine = MachineClass.of(teacher.device)
    if worker.should_make(objects, "calibration", CALIBRATION):
        with noted(objects, worker, "calibrates"):
            body, data = calibration_body(recipe, planned, teacher, objects)
        for copy in calibration_keys(body["arrays_digest"]):
            objects.put(copy, data)
        commit(objects, CALIBRATION, body, new_attempt(), dtype_reason=reason, machine=machine.facts())
    standing = read_document(objects, CALIBRATION)
    body = standing.body
    if wanted.teacher.dtype == AUTO and body["teacher"]["dtype"] != recipe.teacher.dtype:
        return None
    for line in differences(standing.about, machine, recipe.teacher.dtype):
        tell(line)
    refuse_another_teacher(TeacherIdentity.model_validate(body["teacher"]), teacher.identity, recipe)
    made = completed_calibration(body["recipe"])
    refuse_another_recipe("calibrated", made, calibrated_part(recipe, planned.digest), recipe)
    arrays = read_calibration_arrays(objects, body["arrays_digest"])
    manifest = manifest_of(recipe, planned, body)
    why = standing.about.get("dtype_reason", reason)
    frozen, _ = commit(objects, MANIFEST, manifest.body, new_attempt(), dtype_reason=why)
    found = parse_manifest(frozen.body, MANIFEST)
    if names := differing_fields(found, manifest):
        raise MismatchError(
            f"the manifest is another cache's ({', '.join(names)} differ)",
            expected=found.cache_id,
            found=manifest.cache_id,
            where=recipe.cache,
        )
    calibrated = Calibrated(found, arrays, teacher, planned)
    _check_teacher(calibrated, objects)
    return calibrated


def calibration_body(recipe: CacheRecipe, planned: Plan, teacher: Teacher, objects: Objects) -> tuple[dict[str, Any], bytes]:
    """What the calibration document says, and the file of the matrices that it names."""
    body, arrays = measure(recipe, planned, teacher, objects)
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})  # it would write views wrongly
    identity = teacher.identity.model_dump(mode="json")
    return {**body, "teacher": identity, "recipe": calibrated_part(recipe, planned.digest), "arrays_digest": sha256(data)}, data


def load_recipe_teacher(recipe: CacheRecipe, vocab_size: int, worker: Worker = ALONE) -> Teacher:
    """The teacher as the settled recipe's signals need it, on this worker's GPU if there are several."""
    refuse_beyond_teacher(recipe)
    extractors = extractors_of(recipe.signals, recipe.context)
    rows, head = any(e.needs_attention for e in extractors), any(e.needs_head for e in extractors)
    return load_teacher(placed(recipe.teacher, worker.local), vocab_size, capture_rows=rows, needs_head=head)


def read_calibration_arrays(objects: Objects, arrays_digest: str) -> Arrays:
    """The matrices from whichever copy is whole; CorruptError if neither is."""
    keys = calibration_keys(arrays_digest)
    for key in keys:
        if objects.exists(key):
            data = objects.read(key)
            if sha256(data) == arrays_digest:
                return load(data)
    raise CorruptError("both copies of the calibration are damaged", expected=arrays_digest, where=", ".join(keys))


def manifest_of(recipe: CacheRecipe, planned: Plan, body: dict[str, Any]) -> Manifest:
    """The manifest of a settled recipe, its plan and the body of its calibration."""
    files = planned.document.body["tokenizer"]
    tokenizer = TokenizerIdentity(digest=files["digest"], vocab_size=files["vocab_size"])
    extractors = extractors_of(recipe.signals, recipe.context, tags=planned.has_tags)
    settled_signals = {e.name: e.settled(body, tokenizer.vocab_size) for e in extractors}
    cached = {name: settled_signals[name] for name, _ in recipe.signals.cached()}
    signals = recipe.signals.model_copy(update=cached)
    calibration = CalibrationIdentity(
        digest=body["arrays_digest"],
        tail_rank=body["tail_rank"],
        coverage=tuple(body.get("coverage", ())),
        hidden=tuple(HiddenLayout.model_validate(h) for h in body["hidden"]),
        attention=tuple(AttentionLayout.model_validate(a) for a in body["attention"]),
        stats=None if body["stats"] is None else StatsLayout.model_validate(body["stats"]),
        replay_layers=tuple(body["replay_layers"]),
        evidence_layers=tuple(body.get("evidence_layers", ())),
        signals=body.get("signals", {}),
    )
    teacher = TeacherIdentity.model_validate(body["teacher"])
    first = planned.document.body
    return Manifest(
        format_version=FORMAT_VERSION,
        teacher=teacher,
        tokenizer=tokenizer,
        sources=tuple(SourceIdentity.model_validate(source) for source in first["sources"]),
        plan=PlanIdentity(
            digest=planned.digest,
            text_digest=planned.text_digest,
            overlay=first["base"] is not None,
            context=recipe.context,
            overlap=recipe.overlap,
            unit_tokens=recipe.resolved_unit_tokens,
            batch_tokens=recipe.batch_tokens,
            forward=body["forward"],
            split_length=body.get("split_length"),
            capacities=planned.capacities,
        ),
        calibration=calibration,
        signals=signals,
        arrays=tuple(spec.to_json() for spec in _specs(recipe, settled_signals.values(), body, planned)),
    )


def _specs(recipe: CacheRecipe, sections: Iterable[Signal], body: dict[str, Any], planned: Plan) -> Iterator[ArraySpec]:
    """The arrays of the cache, from what it holds and the body of its calibration; an overlay leaves tokens and segments to its
    base."""
    dimensions = Dimensions(
        unit_tokens=recipe.resolved_unit_tokens,
        vocab_size=planned.vocab_size,
        hidden_size=body["teacher"]["hidden_size"],
        capacities=planned.capacities,
        calibration=body,
    )
    if recipe.base is None:
        yield from (*token_arrays(dimensions.unit_tokens), *segment_arrays(dimensions.capacities.segments))
    for section in sections:
        yield from section.arrays(dimensions)


def _check_teacher(calibrated: Calibrated, objects: Objects) -> None:
    """Recompute the plan's first segment: a swapped teacher or a broken kernel is caught here, before it writes anything."""
    first = calibrated.plan.unit(objects, 0)
    pick = TeacherBatch(0, 1, ((0,),))
    expected = torch.from_numpy(calibrated.arrays["check/hidden"])
    outputs = forward(calibrated.teacher, first, pick, calibrated.tap_request)  # and a tap that does not fire is found here
    found = checked_values(outputs.hidden, outputs.logits)
    error = float((found - expected).abs().max() / expected.std().clamp(min=1e-6))
    tolerance = CHECK_TOLERANCE[calibrated.manifest.teacher.dtype]
    if not error <= tolerance:
        raise MismatchError(
            "the teacher does not answer here as it did in calibration",
            expected=f"relative difference at most {tolerance}",
            found=f"{error:.3g}",
            remedy="Check the teacher's weights, the attention kernel and the library versions of this machine.",
        )


def batches_of(calibrated: Calibrated, unit: UnitPlan) -> list[TeacherBatch]:
    """The batches of a unit, as the manifest fixes them."""
    p = calibrated.manifest.plan
    return compose(unit.length, Composition(p.forward, p.split_length), p.context, p.batch_tokens)
