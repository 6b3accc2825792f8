"""Validation: the student on the cache's held-out segments, all of them or the first so many tokens, once, over all ranks."""

from typing import Any

import torch

from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError
from signal_store.manifest import Split
from student_train.data.reader import TOKENS_ONLY, Needs
from student_train.data.rows import Stream
from student_train.evaluate import fidelity
from student_train.recipe import ValidationSection
from student_train.train.parallel import Shared


def check_splits(wanted: ValidationSection | None, cache: Cache) -> None:
    """InputError where there is nothing to train on; or where validation is asked for and the cache holds nothing for it."""
    needed: tuple[Split, ...] = ("train",) if wanted is None else ("train", "validation")
    for split in needed:
        if not len(cache.units(split)):
            raise InputError(f"the cache has no {split} split", expected=f"a source with split: {split}", where=cache.uri)


def validation_needs(cache: Cache, *, with_teacher: bool) -> Needs:
    """What validation reads: the distribution too, where the cache holds it and it is wanted."""
    held = cache.manifest.signals.distribution is not None
    return Needs(distribution=True, hidden=(), attention=()) if held and with_teacher else TOKENS_ONLY


@torch.no_grad()
def validate(shared: Shared, stream: Stream, needs: Needs, max_tokens: int | None) -> dict[str, Any]:
    """`validation_loss` (mean -log q(label) in nats), `validation_tokens` (labels), the loss by source, and `fidelity.summary`."""
    accelerator, student = shared.accelerator, shared.distiller.student
    names = sorted({source.name for source in stream.cache.sources if source.split == "validation"})
    place = {number: names.index(source.name) for number, source in enumerate(stream.cache.sources) if source.name in names}
    by_source = torch.zeros(2, len(names), dtype=torch.float64, device=accelerator.device)
    totals = fidelity.zero_sums(accelerator.device)
    training = student.training
    student.eval()
    for coded in stream.once("validation", needs, max_tokens):
        batch = coded.to(accelerator.device)
        with accelerator.autocast():
            sums = shared.model(batch)
        sources = torch.tensor([place[number] for number in batch.sources], dtype=torch.int64, device=accelerator.device)
        for row, name in enumerate(("segment_loss", "segment_labels")):
            by_source[row].index_add_(0, sources, sums[name].double())
        for name, total in totals.items():
            total += sums[name]
    shared.reshard()
    student.train(training)
    by_source = accelerator.reduce(by_source, reduction="sum")
    totals = {name: accelerator.reduce(total, reduction="sum") for name, total in totals.items()}
    loss, labels = by_source.sum(1).tolist()
    if not labels:
        raise MismatchError("the cache has no validation split", expected="a source with split: validation", found="none")
    means = by_source[0] / by_source[1].clamp(min=1)
    named = {f"validation_loss/{name}": float(mean) for name, mean in zip(names, means, strict=True)} if len(names) > 1 else {}
    return {"validation_loss": loss / labels, "validation_tokens": int(labels), **named, **fidelity.summary(totals)}
