"""How alike the states of student and teacher are at each cached depth: debiased linear CKA, mean over held-out segments."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model_taps.slices import State, tap_states
from model_taps.spread import evenly
from signal_store.cache import Cache
from signal_store.signals import Tap
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.request import SignalRequest
from student_train.data.signals.hidden import HiddenPart, HiddenRequest
from student_train.evaluate.evaluation import SHARE, Quantity
from student_train.losses.cka import debiased_cka
from student_train.losses.features import MIN_TOKENS
from student_train.losses.pairing import LayerPair
from student_train.model.distiller import Distiller
from student_train.model.parallel import ParallelModel

MAX_TOKENS = 64
"""Of a segment, evenly spread."""


@dataclass(frozen=True, slots=True)
class DepthCka:
    """Of the teacher's cached outputs of blocks, in `pairs` with the student's at the same depths (Kornblith et al. 2019, by the
    estimator of Song et al. 2012)."""

    cache: Cache
    pairs: tuple[LayerPair, ...]
    name: ClassVar[str] = "cka"
    tap: ClassVar[Tap] = "block_output"

    @property
    def needs(self) -> SignalRequest:
        """The teacher's states of the pairs."""
        return SignalRequest.of(HiddenRequest(tuple((self.tap, p.teacher) for p in self.pairs)))

    def run(self, student: ParallelModel, batches: Iterable[CodedBatch]) -> dict[str, Quantity]:
        """Mean over segments of at least `MIN_TOKENS` sampled tokens.

        Returns:
            by "<teacher's layer>/<student's layer>", in [-1, 1]; empty where no segment has enough.
        """
        device = student.accelerator.device
        codecs = Codecs.of(self.cache, self.needs, device)
        totals = torch.zeros(len(self.pairs) + 1, dtype=torch.float64, device=device)  # the last counts segments
        with student.evaluating():
            for coded in batches:
                batch = coded.to(device)
                part = HiddenPart.of(batch)
                groups = evenly(torch.tensor(part.segment_rows, dtype=torch.int64), MAX_TOKENS, MIN_TOKENS).to(device)
                with student.accelerator.autocast():
                    states = student.model(batch, look=self._states)
                if not len(groups.index):
                    continue
                for number, (pair, own) in enumerate(zip(self.pairs, states, strict=True)):
                    codes = part.states[self.tap, pair.teacher]
                    other = codecs.hidden[self.tap, pair.teacher].decode(codes.values, codes.scale)
                    totals[number] += debiased_cka(groups.of(own), groups.of(other), groups.inside).double().sum()
                totals[-1] += len(groups.index)
        *sums, segments = student.accelerator.reduce(totals, reduction="sum").tolist()  # waits once, for all batches
        if not segments:
            return {}
        return {f"{p.teacher}/{p.student}": Quantity(total / segments, SHARE) for p, total in zip(self.pairs, sums, strict=True)}

    def _states(self, distiller: Distiller, batch: CodedBatch) -> list[Tensor]:
        """float32 [P, width] of the sampled tokens, by pair."""
        wanted: list[State] = [(self.tap, p.student) for p in self.pairs]
        with tap_states(distiller.student, tuple(dict.fromkeys(wanted))) as states:
            distiller.final_hidden(batch)
        return [states[state].flatten(0, -2)[HiddenPart.of(batch).flat].float() for state in wanted]
