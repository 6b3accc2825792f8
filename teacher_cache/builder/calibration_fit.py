"""What calibration measures: it runs the teacher on a few thousand tokens of all sources, fits what of the signals depends on it,
and finds how segments can share a forward pass. What it reads is a share of the plan, and no more than the fits can use."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model_taps.blocks import unsupported
from run_kit.progress import progress_bar
from signal_store.io.objects import Objects
from teacher_cache.builder.calibration_text import Pick, picks
from teacher_cache.builder.plan import Plan
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.base import CalibrationSample, Facts
from teacher_cache.signals.budget import budget
from teacher_cache.signals.calibrated import joined, taps_of
from teacher_cache.signals.registry import Extractors, extractors_of, merged
from teacher_cache.signals.unit_work import SignalBatch, UnitWork
from teacher_cache.teacher.batches import TeacherBatch
from teacher_cache.teacher.forward import NO_PLACES, forward
from teacher_cache.teacher.load import Teacher, resolve_forward

HEADLESS_TOKENS = 2048
CHECKED_TOKENS = 64
NOTHING_FOUND: Mapping[str, Any] = {"tail_rank": 0, "stats": None, "replay_layers": [], "hidden": [], "attention": []}
"""What the calibration's document says of signals that are off."""

Arrays = dict[str, NDArray[np.float32]]


def measure(recipe: CacheRecipe, planned: Plan, teacher: Teacher, objects: Objects) -> tuple[dict[str, Any], Arrays]:
    """What the calibration's document says of the teacher's answers, and the matrices."""
    extractors = extractors_of(recipe.signals, recipe.context)
    facts = {extractor.name: extractor.decide(teacher) for extractor in extractors}
    first = planned.unit(objects, 0)
    refuse_unsupported(extractors, facts, teacher, first)
    composition = resolve_forward(recipe.forward, teacher, recipe.context, recipe.batch_tokens)
    sizes = [source.num_tokens for source in planned.sources]
    most = HEADLESS_TOKENS if teacher.head is None else None
    shared = budget(recipe.calibration.tokens_per_source, sizes, teacher.identity.hidden_size, most)
    collected, num_tokens = _collect(picks(planned, objects, shared.by_source), teacher, extractors, facts)
    check = forward(teacher, first, TeacherBatch(0, 1, ((0,),)))
    arrays: Arrays = {"check/hidden": checked_values(check.hidden, check.logits).numpy()}
    body = {**NOTHING_FOUND, "forward": composition.forward, "split_length": composition.split_length, "num_tokens": num_tokens}
    sample = CalibrationSample(teacher, num_tokens, sum(sizes), shared.held_out_share)
    for extractor in extractors:
        whole, found = extractor.fit(facts[extractor.name], collected[extractor.name], sample)
        body = merged([body, extractor.document(whole)])
        arrays |= found
    return body, arrays


def refuse_unsupported(extractors: Extractors, facts: Mapping[str, Facts], teacher: Teacher, unit: UnitPlan) -> None:
    """InputError naming what of the signals the family does not give: each is tried on the first segment, before any work."""
    outputs = forward(teacher, unit, TeacherBatch(0, 1, ((0,),)), taps_of(extractors, facts, teacher))
    for layer, rows in outputs.rows.items():
        if rows.shape[1] != teacher.identity.num_heads:
            heads = f"{rows.shape[1]} where its config says {teacher.identity.num_heads}"
            raise unsupported(teacher.model, f"block {layer} has attention rows of another number of heads", heads)
    for extractor in extractors:
        extractor.refuse_unsupported(teacher, outputs)


def _collect(
    chosen: Sequence[Pick], teacher: Teacher, extractors: Extractors, facts: Mapping[str, Facts]
) -> tuple[dict[str, list[Any]], int]:
    """By signal what it collects of each segment; and how many rows there were, but for those that are context only."""
    tap_request = joined(extractor.calibration_taps(facts[extractor.name], teacher) for extractor in extractors)
    collected: dict[str, list[Any]] = {extractor.name: [] for extractor in extractors}
    num_tokens = 0
    with progress_bar() as progress:
        bar = progress.add_task("calibrate", total=sum(len(p.batches) for p in chosen), unit="segments")
        for pick in chosen:
            work = UnitWork(pick.number, pick.unit)
            rows = np.unique(np.concatenate([NO_PLACES, *(e.calibration_places(pick.unit) for e in extractors)]))
            for batch in pick.batches:
                seen = SignalBatch(work, batch, teacher, forward(teacher, pick.unit, batch, tap_request, rows))
                for extractor in extractors:
                    collected[extractor.name].append(extractor.collect(facts[extractor.name], seen))
                num_tokens += int((~seen.is_context).sum())
                progress.advance(bar)
    return collected, num_tokens


def checked_values(hidden: Tensor, logits: Tensor | None) -> Tensor:
    """What every worker recomputes and compares: a few tokens' final states, or logits where there is no head."""
    values = hidden if logits is None else logits[:, :256]
    return values[:CHECKED_TOKENS].float().cpu()
