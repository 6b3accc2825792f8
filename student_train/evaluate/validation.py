"""Validation: the student on the cache's held-out segments, all of them or the first so many tokens, once, over all ranks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model_taps.head import output_head
from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError
from signal_store.manifest import Split
from student_train.align.aligned_cache import AlignedCache
from student_train.data.aligned_rows import AlignedRows
from student_train.data.batch import CodedBatch
from student_train.data.request import TOKENS_ONLY, SignalRequest
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.evaluate import fidelity
from student_train.evaluate.evaluation import BITS, LABELS, NATS, Quantity
from student_train.losses.row_queries import segment_of_row
from student_train.model.distiller import Distiller
from student_train.model.parallel import ParallelModel


def check_splits(cache: Cache, *, validates: bool) -> None:
    """Refuse a cache without what a run is to read.

    Raises:
        InputError: if there is nothing to train on; or nothing to validate on, where that is asked for.
    """
    needed: tuple[Split, ...] = ("train", "validation") if validates else ("train",)
    for split in needed:
        if not len(cache.units(split)):
            raise InputError(f"the cache has no {split} split", expected=f"a source with split: {split}", where=cache.uri)


@dataclass(frozen=True, slots=True)
class Validation:
    """Mean loss of the text's own tokens, by source too; and, `with_teacher`, how faithful the student is to the cached one."""

    cache: Cache
    with_teacher: bool = True
    name: ClassVar[str] = "validation"

    @property
    def needs(self) -> SignalRequest:
        """The distribution, where the cache holds it, of the student's own tokens, and it is wanted."""
        held = self.cache.manifest.signals.distribution is not None and not isinstance(self.cache, AlignedCache)
        return SignalRequest.of(DistributionRequest()) if held and self.with_teacher else TOKENS_ONLY

    def run(self, student: ParallelModel, batches: Iterable[CodedBatch]) -> dict[str, Quantity]:
        """One forward pass a batch.

        Returns:
            `validation_loss`, mean -log q(label) in nats; `validation_tokens`, how many labels; `bits_per_byte` of a student with
            another tokenizer, the sum of the same over the bytes of the text; `validation_loss/<source>` where there are several;
            and `fidelity.summary`.
        Raises:
            MismatchError: if the batches hold no label.
        """
        accelerator = student.accelerator
        names = sorted({source.name for source in self.cache.sources if source.split == "validation"})
        place = {number: names.index(source.name) for number, source in enumerate(self.cache.sources) if source.name in names}
        by_source = torch.zeros(3, len(names), dtype=torch.float64, device=accelerator.device)
        totals = fidelity.zero_sums(accelerator.device)
        with student.evaluating():
            for coded in batches:
                batch = coded.to(accelerator.device)
                with accelerator.autocast():
                    sums = student.model(batch, look=batch_sums)
                sources = torch.tensor([place[number] for number in batch.sources], dtype=torch.int64, device=accelerator.device)
                for row, name in enumerate(("segment_loss", "segment_labels", "segment_bytes")):
                    by_source[row].index_add_(0, sources, sums[name].double())
                for name, total in totals.items():
                    total += sums[name]
        by_source = accelerator.reduce(by_source, reduction="sum")
        totals = {name: accelerator.reduce(total, reduction="sum") for name, total in totals.items()}
        loss, labels, text_bytes = by_source.sum(1).tolist()  # waits for all batches, as do the few numbers below
        if not labels:
            raise MismatchError("the cache has no validation split", expected="a source with split: validation", found="none")
        means = (by_source[0] / by_source[1].clamp(min=1)).tolist() if len(names) > 1 else []
        return {
            "validation_loss": Quantity(loss / labels, NATS),
            "validation_tokens": Quantity(int(labels), LABELS),
            **({"bits_per_byte": Quantity(loss / text_bytes / math.log(2), BITS)} if text_bytes else {}),
            **{f"validation_loss/{name}": Quantity(mean, NATS) for name, mean in zip(names, means, strict=False)},
            **fidelity.summary(totals),
        }


def batch_sums(distiller: Distiller, batch: CodedBatch) -> dict[str, Tensor]:
    """The sums of `fidelity.measure_rows`; and by segment `segment_loss` in nats, `segment_labels` and, where the tokens are not
    the cache's, `segment_bytes`, float32 [segments]."""
    hidden_ND, head = distiller.final_hidden(batch)[batch.flat], output_head(distiller.student)
    codes = DistributionPart.codes_of(batch)
    loss_N, sums = fidelity.measure_rows(hidden_ND, head, batch.labels, codes, distiller.codecs.whole)
    empty = loss_N.new_zeros(len(batch.segment_rows))
    aligned = batch.part(AlignedRows)
    bytes_N = torch.zeros_like(loss_N) if aligned is None else aligned.text_bytes.to(loss_N)
    by_segment = {"segment_loss": loss_N, "segment_labels": (batch.labels >= 0).to(loss_N), "segment_bytes": bytes_N}
    return sums | {name: empty.index_add(0, segment_of_row(batch), value_N) for name, value_N in by_segment.items()}
