"""calibrate: fix what depends on the teacher (`calibration_fit`). Then the layout is known and the manifest is frozen. The first to
commit wins; every worker recomputes one segment and compares."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from model_taps.machine import MachineClass, differences
from model_taps.native_dtype import AUTO
from model_taps.neighbours import Composition
from model_taps.slices import State
from run_kit.progress import tell
from signal_store.cache import open_cache
from signal_store.canonical import sha256
from signal_store.codecs.distribution import DistributionCodec
from signal_store.codecs.hidden import HiddenCodec
from signal_store.errors import CorruptError, MismatchError
from signal_store.format import layout
from signal_store.format.arrays import ArraySpec
from signal_store.format.manifest import (
    FORMAT_VERSION,
    AttentionLayout,
    CalibrationIdentity,
    HiddenLayout,
    Manifest,
    PlanIdentity,
    SourceIdentity,
    StatsLayout,
    TeacherIdentity,
    TokenizerIdentity,
    parse_manifest,
)
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import CALIBRATION, MANIFEST, calibration_keys, commit, new_attempt, read_document
from signal_store.signals import Section, Signals
from teacher_cache.builder.calibration_fit import Arrays, checked_values, measure
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.planning import ensure_plan, settled
from teacher_cache.builder.recipe_parts import calibrated_part, completed_calibration, refuse_another_recipe
from teacher_cache.builder.tokenizer import load_plan_tokenizer
from teacher_cache.builder.worker_notes import noted
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.teacher.dtype import tell_of_emulation, with_dtype
from teacher_cache.teacher.forward import Listening, Teacher, TeacherBatch, compose, load_teacher, placed, think
from teacher_cache.teacher.supported import listening_of
from teacher_cache.worker import ALONE, Worker

CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Calibrated:
    """The frozen manifest, the matrices it speaks of, and the teacher that made or matched them."""

    manifest: Manifest
    arrays: Arrays
    plan: Plan
    teacher: Teacher

    @cached_property
    def distribution(self) -> DistributionCodec:
        """Codec of the distribution, on the teacher's device."""
        signal = self.manifest.signals.distribution
        assert signal is not None
        codec = DistributionCodec.from_arrays(self.arrays, signal, self.manifest.teacher.logit_softcap)
        return codec.to(self.teacher.device)

    @cached_property
    def hidden(self) -> dict[str, HiddenCodec]:
        """Codec of each cached group of hidden states, on the teacher's device."""
        signal = self.manifest.signals.hidden
        bits = 8 if signal is None or signal.values == "int8" else 16
        groups = [h.group for h in self.manifest.calibration.hidden]
        return {group: HiddenCodec.from_arrays(self.arrays, group, bits).to(self.teacher.device) for group in groups}

    @property
    def listening(self) -> Listening:
        """What of the teacher is read while it runs."""
        found, last = self.manifest.calibration, self.manifest.teacher.num_layers
        states: list[State] = [(h.tap, h.layer) for h in found.hidden]
        rows = [a.layer for a in found.attention]
        others = (found.stats, found.replay_layers, found.evidence_layers, last)
        return listening_of(self.manifest.signals, states, rows, *others)


def calibrate(recipe: CacheRecipe, worker: Worker = ALONE) -> Calibrated:
    """Calibrate, or take the calibration that stands; MismatchError if another teacher or recipe of signals made it."""
    planned = ensure_plan(recipe, worker)
    load_plan_tokenizer(recipe.teacher, planned.document.body["tokenizer"]["digest"], recipe.cache)
    return calibrate_planned(recipe, planned, worker)


def calibrate_planned(recipe: CacheRecipe, planned: Plan, worker: Worker = ALONE) -> Calibrated:
    """`calibrate`, with a plan that is there."""
    wanted, objects = settled(recipe), objects_at(recipe.cache)
    recipe, reason = with_dtype(wanted, objects, worker)
    tell_of_emulation(recipe, reason, worker)
    teacher = load_recipe_teacher(recipe, planned.vocab_size, worker)
    if recipe.base is not None:
        _refuse_another_than_the_base(recipe.base, teacher.identity)
    machine = MachineClass.of(teacher.device)
    if worker.should_make(objects, "calibration", CALIBRATION):
        with noted(objects, worker, "calibrates"):
            body, data = calibration_body(recipe, planned, teacher, objects)
        for copy in calibration_keys(body["arrays_digest"]):
            objects.put(copy, data)
        commit(objects, CALIBRATION, body, new_attempt(), dtype_reason=reason, machine=machine.facts())
    standing = read_document(objects, CALIBRATION)
    body = standing.body
    if wanted.teacher.dtype == AUTO and body["teacher"]["dtype"] != recipe.teacher.dtype:  # a machine of another class was first
        return calibrate_planned(wanted, planned, worker)
    for line in differences(standing.about, machine, recipe.teacher.dtype):
        tell(line)
    _refuse_another_teacher(TeacherIdentity.model_validate(body["teacher"]), teacher.identity, recipe)
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
    calibrated = Calibrated(found, arrays, planned, teacher)
    _check_teacher(calibrated, objects)
    return calibrated


def calibration_body(recipe: CacheRecipe, planned: Plan, teacher: Teacher, objects: Objects) -> tuple[dict[str, Any], bytes]:
    """What the calibration document says, and the file of the matrices that it names."""
    body, arrays = measure(recipe, planned, teacher, objects)
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})  # it would write views wrongly
    identity = teacher.identity.model_dump(mode="json")
    return {**body, "teacher": identity, "recipe": calibrated_part(recipe, planned.digest), "arrays_digest": sha256(data)}, data


def load_recipe_teacher(recipe: CacheRecipe, vocab_size: int, worker: Worker = ALONE) -> Teacher:
    """The teacher as the recipe's signals need it, on this worker's GPU if there are several."""
    signals = recipe.signals
    needs_head = (signals.distribution is not None and signals.distribution.rank != 0) or signals.replay is not None
    needs_head |= signals.stats is not None and signals.stats.gradient
    rows = signals.attention is not None or (signals.stats is not None and signals.stats.attention) or signals.evidence is not None
    return load_teacher(placed(recipe.teacher, worker), vocab_size, capture_rows=rows, needs_head=needs_head)


def read_calibration_arrays(objects: Objects, arrays_digest: str) -> Arrays:
    """The matrices from whichever copy is whole; CorruptError if neither is."""
    keys = calibration_keys(arrays_digest)
    for key in keys:
        if objects.exists(key):
            data = objects.read(key)
            if sha256(data) == arrays_digest:
                return load(data)
    raise CorruptError("both copies of the calibration are damaged", expected=arrays_digest, where=", ".join(keys))


def differing_fields(one: Section, other: Section) -> list[str]:
    """Names of the fields that two sections of one kind, as this version reads them, do not share."""
    return [name for name in type(one).model_fields if getattr(one, name) != getattr(other, name)]


def _refuse_another_than_the_base(base: str, found: TeacherIdentity) -> None:
    """`open_cache` would refuse the two, but only when all is done."""
    made = open_cache(base).manifest.teacher
    if made.weights_digest != found.weights_digest:
        raise MismatchError(
            "the overlay's teacher is not its base's",
            expected=f"{made.name} in {made.dtype}, {made.weights_digest}",
            found=f"{found.name} in {found.dtype}, {found.weights_digest}",
            where=base,
            remedy="Give the teacher and the dtype that the base was made with.",
        )


def _refuse_another_teacher(made: TeacherIdentity, found: TeacherIdentity, recipe: CacheRecipe) -> None:
    names = [name for name in differing_fields(made, found) if name not in {"name", "revision"}]
    if names:
        raise MismatchError(
            f"another teacher ({', '.join(names)} differ)",
            expected={n: getattr(made, n) for n in names},
            found={n: getattr(found, n) for n in names},
            where=recipe.teacher.model,
            remedy="Restore the teacher that began this cache, or build into another folder.",
        )


def manifest_of(recipe: CacheRecipe, planned: Plan, body: dict[str, Any]) -> Manifest:
    """The manifest of a settled recipe, its plan and the body of its calibration."""
    files = planned.document.body["tokenizer"]
    tokenizer = TokenizerIdentity(digest=files["digest"], vocab_size=files["vocab_size"])
    signals = recipe.signals
    if signals.distribution is not None:
        head = body["head"] if "head" in body else min(signals.distribution.head_size, tokenizer.vocab_size)
        signal = signals.distribution.model_copy(update={"head": head})
        signals = signals.model_copy(update={"distribution": signal})
    calibration = CalibrationIdentity(
        digest=body["arrays_digest"],
        tail_rank=body["tail_rank"],
        coverage=tuple(body.get("coverage", ())),
        hidden=tuple(HiddenLayout.model_validate(h) for h in body["hidden"]),
        attention=tuple(AttentionLayout.model_validate(a) for a in body["attention"]),
        stats=None if body["stats"] is None else StatsLayout.model_validate(body["stats"]),
        replay_layers=tuple(body["replay_layers"]),
        evidence_layers=tuple(body.get("evidence_layers", ())),
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
        arrays=tuple(spec.to_json() for spec in _specs(recipe, signals, calibration, body, planned)),
    )


def _specs(
    recipe: CacheRecipe, signals: Signals, calibration: CalibrationIdentity, body: dict[str, Any], planned: Plan
) -> list[ArraySpec]:
    """The arrays of the cache, from what it holds and the body of its calibration; an overlay leaves tokens and segments to its
    base."""
    capacities, unit_tokens = planned.capacities, recipe.resolved_unit_tokens
    specs: list[ArraySpec] = []
    if recipe.base is None:
        specs += [*layout.token_arrays(unit_tokens), *layout.segment_arrays(capacities.segments)]
        specs += layout.tag_arrays(unit_tokens) if planned.has_tags else ()
    if signals.distribution is not None:
        zigzag = bool(body.get("tail_zigzag"))  # caches that were calibrated before there was such a coding go on as they began
        rank, vocab_size = calibration.tail_rank, planned.vocab_size
        specs += layout.distribution_arrays(signals.distribution, rank, unit_tokens, vocab_size, zigzag=zigzag)
    if signals.hidden is not None:
        if signals.hidden.positions != "all":
            specs += layout.row_range_arrays("hidden", capacities.segments)
            specs.append(layout.position_array("hidden", capacities.hidden_rows))
        for h in calibration.hidden:
            specs += layout.hidden_arrays(h, signals.hidden, unit_tokens, capacities)
    if signals.attention is not None:
        specs += [*layout.row_range_arrays("attention", capacities.segments), *layout.attention_row_arrays(capacities)]
        for a in calibration.attention:
            specs += layout.attention_arrays(a, capacities)
    if signals.stats is not None and calibration.stats is not None:
        specs += layout.stats_arrays(signals.stats, calibration.stats, capacities)
    if signals.replay is not None:
        specs += layout.row_range_arrays("replay", capacities.segments)
        specs += layout.replay_arrays(signals.replay, calibration.replay_layers, body["teacher"]["hidden_size"], capacities)
    if signals.evidence is not None:
        specs += layout.row_range_arrays("evidence", capacities.segments)
        specs += layout.evidence_arrays(calibration.evidence_layers, capacities)
    if signals.coverage is not None:
        specs += layout.row_range_arrays("coverage", capacities.segments)
        specs += layout.coverage_arrays(capacities, planned.vocab_size)
    return specs


def _check_teacher(calibrated: Calibrated, objects: Objects) -> None:
    """Recompute the plan's first segment: a swapped teacher or a broken kernel is caught here, before it writes anything."""
    first = calibrated.plan.unit(objects, 0)
    pick = TeacherBatch(0, 1, ((0,),))
    expected = torch.from_numpy(calibrated.arrays["check/hidden"])
    thoughts = think(calibrated.teacher, first, pick, calibrated.listening)  # and a tap that does not fire is found here
    found = checked_values(thoughts.hidden, thoughts.logits)
    error = float((found - expected).abs().max() / expected.std().clamp(min=1e-6))
    tolerance = CHECK_TOLERANCE[calibrated.manifest.teacher.dtype]
    if not error <= tolerance:
        raise MismatchError(
            "the teacher does not think here what it thought in calibration",
            expected=f"relative difference at most {tolerance}",
            found=f"{error:.3g}",
            remedy="Check the teacher's weights, the attention kernel and the library versions of this machine.",
        )


def batches_of(calibrated: Calibrated, unit: UnitPlan) -> list[TeacherBatch]:
    """The batches of a unit, as the manifest fixes them."""
    p = calibrated.manifest.plan
    return compose(unit.length, Composition(p.forward, p.split_length), p.context, p.batch_tokens)
