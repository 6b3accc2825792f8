"""calibrate: run the teacher on a few thousand tokens and fix what depends on it: tail basis and rank, PCA bases, attention
heads, int8 steps, packed or padded. Then the layout is known and the manifest is frozen. The first to commit wins."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from model_taps.blocks import layer_at_depth
from signal_store import layout
from signal_store.arrays import ArraySpec
from signal_store.canonical import sha256
from signal_store.distribution_codec import DistributionCodec
from signal_store.errors import CorruptError, InputError, MismatchError
from signal_store.hidden_codec import HiddenCodec
from signal_store.ledger import CALIBRATION, MANIFEST, commit, find_document, new_attempt
from signal_store.manifest import (
    FORMAT_VERSION,
    AttentionLayout,
    CalibrationIdentity,
    HiddenLayout,
    Manifest,
    PlanIdentity,
    TeacherIdentity,
    TokenizerIdentity,
    parse_manifest,
)
from signal_store.objects import LocalObjects, Objects
from signal_store.progress import progress_bar
from teacher_cache.plan import Plan, plan, refuse_another_recipe
from teacher_cache.recipe import CacheRecipe
from teacher_cache.tail_basis import TailFit, choose_codec
from teacher_cache.teacher import Teacher, TeacherBatch, attention_layers, compose, load_teacher, resolve_forward, think
from teacher_cache.unit_plan import UnitPlan

TOKENS_PER_CHANNEL = 16
HELD_OUT_EVERY = 4
CHECKED_TOKENS = 64
MAX_UNITS_READ = 64
CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}

Arrays = dict[str, NDArray[np.float32]]


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
    def hidden(self) -> dict[int, HiddenCodec]:
        """Codec of each cached layer's output, on the teacher's device."""
        layers = [h.layer for h in self.manifest.calibration.hidden]
        return {layer: HiddenCodec.from_arrays(self.arrays, layer).to(self.teacher.device) for layer in layers}


def calibrate(recipe: CacheRecipe) -> Calibrated:
    """Calibrate, or take the calibration that stands; MismatchError if another teacher or recipe of signals made it."""
    planned = plan(recipe)
    objects = LocalObjects(recipe.cache)
    tokenizer = TokenizerIdentity.model_validate(planned.document.body["tokenizer"])
    teacher = load_teacher(recipe.teacher, tokenizer.vocab_size, capture_rows=recipe.signals.attention is not None)
    standing = find_document(objects, CALIBRATION)
    if standing is None:
        body, arrays = _measure(recipe, planned, teacher, objects)
        attempt = new_attempt()
        data = save(arrays)
        body["arrays_digest"] = sha256(data)
        for copy in calibration_keys(body["arrays_digest"]):
            objects.put(copy, data)
        standing, _ = commit(objects, CALIBRATION, body, attempt)
    body = standing.body
    _refuse_another_teacher(TeacherIdentity.model_validate(body["teacher"]), teacher.identity, recipe)
    refuse_another_recipe("calibrated", body["recipe"], calibrated_part(recipe, planned), recipe)
    arrays = read_calibration_arrays(objects, body["arrays_digest"])
    manifest = _manifest(recipe, planned, tokenizer, body)
    frozen, _ = commit(objects, MANIFEST, manifest.model_dump(mode="json"), new_attempt())
    found = parse_manifest(frozen.body, MANIFEST)
    if found.cache_id != manifest.cache_id:
        raise MismatchError("the manifest is another cache's", expected=manifest.cache_id, found=found.cache_id, where=recipe.cache)
    calibrated = Calibrated(found, arrays, planned, teacher)
    _check_teacher(calibrated, objects)
    return calibrated


def calibrated_part(recipe: CacheRecipe, planned: Plan) -> dict[str, Any]:
    """What decides the calibration, as JSON: the plan, and all of the recipe that the plan did not look at but the teacher's
    place and name, for which its digests speak."""
    teacher = recipe.teacher.model_dump(mode="json", include={"dtype"})
    rest = recipe.model_dump(mode="json", include={"signals", "batch_tokens", "forward", "calibration"})
    return {"plan": planned.digest, **{f"teacher.{name}": value for name, value in teacher.items()}, **rest}


def calibration_keys(arrays_digest: str) -> tuple[str, str]:
    """Where the calibrated matrices lie, twice: without the tail basis all tails are noise."""
    name = arrays_digest.removeprefix("sha256:")[:16]
    return f"ledger/calibration/{name}.safetensors", f"ledger/calibration/{name}.copy.safetensors"


def read_calibration_arrays(objects: Objects, arrays_digest: str) -> Arrays:
    """The matrices from whichever copy is whole; CorruptError if neither is."""
    keys = calibration_keys(arrays_digest)
    for key in keys:
        if objects.exists(key):
            data = objects.read(key)
            if sha256(data) == arrays_digest:
                return load(data)
    raise CorruptError("both copies of the calibration are damaged", expected=arrays_digest, where=", ".join(keys))


def _refuse_another_teacher(made: TeacherIdentity, found: TeacherIdentity, recipe: CacheRecipe) -> None:
    names = [n for n in TeacherIdentity.model_fields if n not in {"name", "revision"} and getattr(made, n) != getattr(found, n)]
    if names:
        raise MismatchError(
            f"another teacher ({', '.join(names)} differ)",
            expected={n: getattr(made, n) for n in names},
            found={n: getattr(found, n) for n in names},
            where=recipe.teacher.model,
            remedy="Restore the teacher that began this cache, or build into another folder.",
        )


@dataclass(frozen=True, slots=True)
class _Pick:
    """Segments of a unit to calibrate on, as batches of one segment each."""

    unit: UnitPlan
    batches: list[TeacherBatch]


def _picks(planned: Plan, objects: Objects, tokens_per_source: int) -> list[_Pick]:
    """Segments spread evenly over each source, until its share is reached."""
    chosen_units = sorted(
        set(np.linspace(0, planned.num_units - 1, min(planned.num_units, MAX_UNITS_READ)).round().astype(int).tolist())
    )
    units = [planned.unit(objects, int(u)) for u in chosen_units]
    picked: list[list[int]] = [[] for _ in units]
    for source in range(len(planned.sources)):
        places = [(u, int(s)) for u, unit in enumerate(units) for s in np.flatnonzero(unit.source == source)]
        total = sum(int(units[u].length[s]) for u, s in places)
        count = min(len(places), max(1, round(len(places) * tokens_per_source / max(1, total))))
        for i in np.linspace(0, len(places) - 1, count).round().astype(int) if places else ():
            u, s = places[i]
            picked[u].append(s)
    return [
        _Pick(unit, [TeacherBatch(s, s + 1, ((s,),)) for s in sorted(set(segments))])
        for unit, segments in zip(units, picked, strict=True)
        if segments
    ]


def _measure(recipe: CacheRecipe, planned: Plan, teacher: Teacher, objects: Objects) -> tuple[dict[str, Any], Arrays]:
    """The calibration record's body and the matrices."""
    layers = _hidden_layers(recipe, teacher)
    attention = recipe.signals.attention
    row_layers = attention_layers(teacher, attention.layers) if attention else ()
    tokens = recipe.calibration.tokens_per_source or TOKENS_PER_CHANNEL * teacher.identity.hidden_size
    picks = _picks(planned, objects, tokens)
    final: list[Tensor] = []
    states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    entropy: dict[int, list[Tensor]] = {layer: [] for layer in row_layers}
    with progress_bar() as progress:
        bar = progress.add_task("calibrate", total=sum(len(p.batches) for p in picks), unit="segments")
        for pick in picks:
            for batch in pick.batches:
                thoughts = think(teacher, pick.unit, batch, layers, row_layers)
                final.append(thoughts.hidden.float().cpu())
                for layer in layers:
                    states[layer].append(thoughts.blocks[layer].float().cpu())
                for layer in row_layers:
                    entropy[layer].append(_row_entropy(thoughts.rows[layer], thoughts.row_lengths).cpu())
                progress.advance(bar)
    check = think(teacher, planned.unit(objects, 0), TeacherBatch(0, 1, ((0,),)), (), ())
    arrays: Arrays = {"check/hidden": check.hidden[:CHECKED_TOKENS].float().cpu().numpy()}
    body: dict[str, Any] = {
        "teacher": teacher.identity.model_dump(mode="json"),
        "recipe": calibrated_part(recipe, planned),
        "forward": resolve_forward(recipe.forward, teacher),
        "num_tokens": sum(len(h) for h in final),
        "tail_rank": 0,
    }
    head = teacher.head.to("cpu")
    if recipe.signals.distribution is not None:
        signal = recipe.signals.distribution.model_copy(update={"head": min(recipe.signals.distribution.head, teacher.vocab_size)})
        fit_nD = torch.cat([h for i, h in enumerate(final) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1])
        held_nD = torch.cat(final[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or final)
        codec, fidelity = choose_codec(TailFit.of(fit_nD, head, signal), head, signal, held_nD)
        arrays |= codec.to_arrays()
        body["tail_rank"] = codec.rank
        body["fidelity"] = {"scaled_kl_nats": fidelity.scaled_kl_nats, "angle_degrees": fidelity.angle_degrees}
        body["head_mass"] = list(fidelity.head_mass)
    body["hidden"] = []
    for layer in layers:
        hidden_codec, explained = _fit_hidden(
            torch.cat(states[layer]), recipe.signals.hidden.rank if recipe.signals.hidden else None
        )
        arrays |= hidden_codec.to_arrays(layer)
        rank = None if hidden_codec.basis is None else hidden_codec.basis.shape[1]
        body["hidden"].append({"layer": layer, "width": len(hidden_codec.mean), "rank": rank, "explained_variance": explained})
    body["attention"] = [
        {
            "layer": layer,
            "head_ids": _most_focused(torch.cat(entropy[layer]), attention.heads),
            "max_columns": recipe.resolved_max_columns,
        }
        for layer in row_layers
        if attention is not None
    ]
    return body, arrays


def _hidden_layers(recipe: CacheRecipe, teacher: Teacher) -> tuple[int, ...]:
    hidden = recipe.signals.hidden
    if hidden is None:
        return ()
    count = teacher.identity.num_layers
    if hidden.layers is None:
        return tuple(sorted({layer_at_depth(f, count) for f in hidden.depths}))
    if not all(1 <= layer <= count for layer in hidden.layers):
        raise InputError("no such block", expected=f"1 to {count}", found=list(hidden.layers), where="signals.hidden.layers")
    return tuple(sorted(set(hidden.layers)))


def _fit_hidden(states_ND: Tensor, rank: int | None) -> tuple[HiddenCodec, float]:
    """The codec, and the share of variance it keeps."""
    mean = states_ND.double().mean(0)
    centred = states_ND.double() - mean
    if rank is None or rank >= states_ND.shape[1]:
        spread = centred.square().mean(0).sqrt().clamp(min=1e-6)
        return HiddenCodec(mean.float(), spread.float(), None), 1.0
    energy, directions = torch.linalg.eigh(centred.T @ centred)
    kept = directions[:, energy.argsort(descending=True)[:rank]]
    share = float(energy.sort(descending=True).values[:rank].sum() / energy.sum().clamp(min=1e-30))
    return HiddenCodec(mean.float(), torch.ones(len(mean)), kept.float()), share


def _row_entropy(rows_RHL: Tensor, lengths_R: Tensor) -> Tensor:
    """[R', H]: entropy of each row over log of its length (0 focused, 1 flat); rows of one key say nothing and are left out."""
    long = lengths_R > 1
    rows = rows_RHL[long].double()
    return -(rows * rows.clamp(min=1e-30).log()).sum(-1) / lengths_R[long].double().log()[:, None]


def _most_focused(entropy_RH: Tensor, heads: int) -> list[int]:
    """The heads with the lowest mean entropy (REQUIREMENTS 70), ascending by number."""
    if not len(entropy_RH):
        raise InputError("no keyword in the calibration text", expected="some, to choose attention heads by", found="none")
    return sorted(entropy_RH.mean(0).argsort(stable=True)[:heads].tolist())


def _manifest(recipe: CacheRecipe, planned: Plan, tokenizer: TokenizerIdentity, body: dict[str, Any]) -> Manifest:
    capacities = planned.capacities
    unit_tokens = recipe.resolved_unit_tokens
    signals = recipe.signals
    hidden = tuple(HiddenLayout(layer=h["layer"], width=h["width"], rank=h["rank"]) for h in body["hidden"])
    attention = tuple(AttentionLayout.model_validate(a) for a in body["attention"])
    specs: list[ArraySpec] = [*layout.token_arrays(unit_tokens), *layout.segment_arrays(capacities.segments)]
    if signals.distribution is not None:
        signal = signals.distribution.model_copy(update={"head": min(signals.distribution.head, tokenizer.vocab_size)})
        signals = signals.model_copy(update={"distribution": signal})
        specs += layout.distribution_arrays(signal, body["tail_rank"], unit_tokens)
    for h in hidden:
        specs += layout.hidden_arrays(h, signals.hidden.every if signals.hidden else 1, unit_tokens, capacities)
    for a in attention:
        specs += layout.attention_arrays(a, capacities)
    return Manifest(
        format_version=FORMAT_VERSION,
        teacher=TeacherIdentity.model_validate(body["teacher"]),
        tokenizer=tokenizer,
        sources=planned.sources,
        plan=PlanIdentity(
            digest=planned.digest,
            context=recipe.context,
            overlap=recipe.overlap,
            unit_tokens=unit_tokens,
            batch_tokens=recipe.batch_tokens,
            forward=body["forward"],
            capacities=capacities,
        ),
        calibration=CalibrationIdentity(
            digest=body["arrays_digest"],
            tail_rank=body["tail_rank"],
            head_mass=tuple(body.get("head_mass", ())),
            hidden=hidden,
            attention=attention,
        ),
        signals=signals,
        arrays=tuple(spec.to_json() for spec in specs),
    )


def _check_teacher(calibrated: Calibrated, objects: Objects) -> None:
    """Recompute the plan's first segment: a swapped teacher or a broken kernel is caught here, before it writes anything."""
    first = calibrated.plan.unit(objects, 0)
    pick = TeacherBatch(0, 1, ((0,),))
    expected = torch.from_numpy(calibrated.arrays["check/hidden"])
    found = think(calibrated.teacher, first, pick, (), ()).hidden.float().cpu()[: len(expected)]
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
    return compose(unit.length, p.forward, p.context, p.batch_tokens)
