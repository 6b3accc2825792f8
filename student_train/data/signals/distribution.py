"""The next-token distribution, of the rows that count."""

from dataclasses import dataclass

import torch
from torch import Tensor

from signal_store.cache import Cache
from signal_store.codecs.cached import distribution_codec
from signal_store.codecs.distribution import DistributionCodec, DistributionCodes
from student_train.data.batch import CodedBatch
from student_train.data.part import Part
from student_train.data.placement import Placement
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class DistributionPart(Part):
    """`codes` of N rows."""

    codes: DistributionCodes

    @classmethod
    def codes_of(cls, batch: CodedBatch) -> DistributionCodes | None:
        """The batch's codes, where it has them."""
        part = batch.part(cls)
        return None if part is None else part.codes


@dataclass(frozen=True, slots=True)
class DistributionRequest(Request):
    """Head, tail and masses; drawn ids are not read."""

    def groups(self) -> tuple[str, ...]:
        """See the base."""
        return ("distribution/head", "distribution/tail", "distribution/scalars")

    def codecs(self, cache: Cache, device: torch.device) -> DistributionCodec:
        """Of all cached directions."""
        return distribution_codec(cache).to(device)

    def gather(self, placement: Placement) -> DistributionPart:
        """See the base; what the cache does not hold (a tail of rank 0, a head of no ids) has no columns."""
        rows, unit = [p.tokens.rows for p in placement.segments], placement.segments[0].unit
        scalars = placement.gathered("distribution/scalars", rows)

        def of(name: str, dtype: torch.dtype) -> Tensor:
            path = f"distribution/{name}"
            return placement.gathered(path, rows) if unit.has(path) else torch.zeros(len(scalars), 0, dtype=dtype)

        head = of("head_ids", torch.int32), of("head_codes", torch.uint8)
        return DistributionPart(DistributionCodes(*head, of("tail_codes", torch.int8), scalars))
