"""fidelity: how much of its teacher a finished student has kept (REQUIREMENTS 10), from the cache's held-out split; no teacher is
needed.

Agreement, overlap, KL, entropy gap and calibration error as `evaluate.fidelity` defines them; and, where the cache holds
blocks' outputs, their debiased linear CKA with the student's at the same depth, mean over segments.
"""

from pathlib import Path
from typing import Any

import torch

from model_taps.head import final_hidden
from model_taps.slices import State, tap_states
from model_taps.spread import evenly
from signal_store.cache import Cache, open_cache
from signal_store.errors import MismatchError
from signal_store.signals import Tap
from student_train.data.codecs import Codecs
from student_train.data.reader import Needs
from student_train.data.rows import Stream
from student_train.evaluate.validation import validate, validation_needs
from student_train.losses.cka import debiased_cka
from student_train.losses.features import MIN_TOKENS
from student_train.losses.objective import Objective
from student_train.losses.pairing import LayerPair, state_pairs
from student_train.losses.section import Losses
from student_train.recipe import SharingSection, StreamSection, StudentSection
from student_train.student.build import build_student, packs_rows
from student_train.train.distiller import Distiller
from student_train.train.parallel import Shared, accelerator_of

TAP: Tap = "block_output"
CKA_TOKENS = 64
"""Of a segment, evenly spread."""


def fidelity_report(
    student: Path, cache: str | tuple[str, ...], max_tokens: int | None = None, *, bf16: bool = False
) -> dict[str, Any]:
    """Numbers by name; `tokens` says how many labels they are of, `cka` by "teacher layer/student layer". MismatchError where the
    cache has no validation split or no distribution."""
    opened = open_cache(cache)
    if opened.manifest.signals.distribution is None:
        raise MismatchError("the cache holds no distribution to compare with", expected="signals.distribution", where=opened.uri)
    if not len(opened.units("validation")):
        raise MismatchError("the cache has no validation split", expected="a source with split: validation", where=opened.uri)
    model, _ = build_student(StudentSection(checkpoint=str(student)), opened)
    accelerator = accelerator_of(bf16=bf16)
    distiller = Distiller(model, Objective(Losses.of({}), {})).to(accelerator.device)
    shared = Shared.of(accelerator, distiller, SharingSection.model_validate({}))
    needs = validation_needs(opened, with_teacher=True)
    distiller.codecs = Codecs.of(opened, needs, accelerator.device)
    rows = StreamSection(row_tokens=opened.manifest.plan.context, rows_per_step=4)
    with accelerator.autocast():
        packed = packs_rows(model, opened, rows)
    stream = Stream(opened, needs, rows, packed=packed)
    found = validate(shared, stream, needs, max_tokens)
    found["tokens"] = found.pop("validation_tokens")
    held = any(h.tap == TAP for h in opened.manifest.calibration.hidden)
    pairs = state_pairs("cka", TAP, opened, model) if held else ()
    return {**found, "cka": depth_cka(shared, opened, stream, pairs, max_tokens) if pairs else {}}


@torch.no_grad()
def depth_cka(
    shared: Shared, cache: Cache, stream: Stream, pairs: tuple[LayerPair, ...], max_tokens: int | None
) -> dict[str, float]:
    """By pair of layers; empty where no segment has enough sampled tokens."""
    device, student = shared.accelerator.device, shared.distiller.student
    needs = Needs(False, tuple((TAP, p.teacher) for p in pairs), ())
    codecs = Codecs.of(cache, needs, device)
    totals, segments = torch.zeros(len(pairs), dtype=torch.float64), 0
    student.eval()
    wanted: list[State] = [(TAP, p.student) for p in pairs]
    for coded in stream.once("validation", needs, max_tokens):
        batch = coded.to(device)
        groups = evenly(torch.tensor(batch.hidden_rows, dtype=torch.int64), CKA_TOKENS, MIN_TOKENS).to(batch.hidden_flat.device)
        if not len(groups.index):
            continue
        with shared.accelerator.autocast(), tap_states(student, tuple(dict.fromkeys(wanted))) as states:
            final_hidden(student, batch.input_ids, batch.position_ids if batch.packed else None)
        for number, pair in enumerate(pairs):
            codes = batch.hidden[TAP, pair.teacher]
            other = codecs.hidden[TAP, pair.teacher].decode(codes.values, codes.scale)
            own = states[TAP, pair.student].flatten(0, -2)[batch.hidden_flat].float()
            totals[number] += debiased_cka(groups.of(own), groups.of(other), groups.inside).double().sum().cpu()
        segments += len(groups.index)
    means = (totals / max(1, segments)).tolist()
    return {f"{p.teacher}/{p.student}": mean for p, mean in zip(pairs, means, strict=True)} if segments else {}
