"""The path of meaning replayed: from the same token, teacher and student each walk up the gradient of their own loss through their
own final norm and output head; the student's steps must point where the teacher's did, and its loss rise alike.

mean over steps j, ρʲ-weighted, of ‖P (s_j - s_0) / ‖s_K - s_0‖ - (h_j - h_0) / ‖h_K - h_0‖‖² + |ΔNLL_S - ΔNLL_T| / ΔNLL_T(K). The
losses' rises are shares of the teacher's whole rise, as the steps are of the whole path: in nats they are tens, and drowned all
else (`tools/bench/LOG.md`). The gradient runs through the walk (double backward through norm and head only) into the state; the
head itself is the yardstick and takes none, which would cost more than all else. Legend: P tokens, K steps, D widths.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.blocks import num_layers
from model_taps.head import final_norm
from model_taps.slices import State
from signal_store.cache import Cache
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.replay import ReplayPart, ReplayRequest
from student_train.losses.features import make_projection
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.temporal import TemporalLoss, TokenLosses
from student_train.losses.term import Reads, StateTerm, StudentOutputs, TermSection, at_least_float32, not_cached

TINY = 1e-12
LEAST_RISE_NATS = 1.0
"""A teacher's loss that rises by less is taken to rise by this."""


class ReplaySection(TermSection):
    """Σ_j ρʲ ‖P Δs_j - Δh_j‖² + |ΔNLL_S - ΔNLL_T|: student and teacher walk up their own losses from the same token, steps and
    rises in units of the teacher's whole path; mean over sampled tokens of finished texts and over steps."""

    weight: WeightField = constant(0.05)
    discount: float = Field(0.9, gt=0, le=1)


class Replay(TemporalLoss):
    """Paths of sampled tokens; P is learned."""

    def __init__(self, section: ReplaySection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        signal = cache.manifest.signals.replay
        if signal is None:
            raise not_cached("replay", "signals.replay", cache)
        self.section, self.steps, self.step_size = section, signal.steps, signal.step_size
        own = student.config.get_text_config().hidden_size
        self.projection = make_projection(own, cache.manifest.teacher.hidden_size)
        self._norm = [final_norm(student)]  # in a list: the student's own parameters are not this module's
        self.last: State = ("block_output", num_layers(student))
        self.reads = Reads(SignalRequest.of(ReplayRequest()), (self.last,))

    def count(self, batch: CodedBatch) -> int:
        """Sampled tokens."""
        part = batch.part(ReplayPart)
        return 0 if part is None else len(part.flat)

    def per_token(self, outputs: StudentOutputs) -> TokenLosses:
        """Of sampled tokens."""
        states = outputs.states[self.last].flatten(0, 1)
        codes = outputs.batch.part(ReplayPart)
        if codes is None or not len(codes.flat):
            nothing = 0 * (states.sum() + self.projection.weight.sum())
            return TokenLosses(outputs.batch.flat[:0], nothing.new_zeros(0), nothing)
        with torch.autocast(states.device.type, enabled=False):
            start = at_least_float32(states[codes.flat])
            moved, nll = self._walk(start, codes.labels, outputs)
            theirs = codes.values.float() * codes.scale[:, None, None]
            ends = self.projection(moved), theirs
            lengths = (x[:, -1].norm(dim=1)[:, None, None].clamp(min=TINY) for x in (moved, theirs))
            apart = (ends[0] / next(lengths) - ends[1] / next(lengths)).square().sum(2)
            rises = nll[:, 1:] - nll[:, :1], codes.nll[:, 1:] - codes.nll[:, :1]
            rise = (rises[0] - rises[1]).abs() / rises[1][:, -1:].clamp(min=LEAST_RISE_NATS)
            weights = self.section.discount ** torch.arange(self.steps, device=start.device)
            return TokenLosses(codes.flat, ((apart + rise) * weights).sum(1) / weights.sum())

    def _walk(self, start_PD: Tensor, labels_P: Tensor, outputs: StudentOutputs) -> tuple[Tensor, Tensor]:
        """(s_j - s_0 [P, K, D], losses [P, K + 1]), in the graph."""
        norm, head = self._norm[0], outputs.head
        head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        length_P1 = self.step_size * start_PD.norm(dim=1, keepdim=True)
        state, states, losses = start_PD, [], []

        def loss_of(state_PD: Tensor) -> Tensor:
            return F.cross_entropy(head.logits(at_least_float32(norm(state_PD))), labels_P, reduction="none")

        for _ in range(self.steps):
            nll_P = loss_of(state)
            (gradient,) = torch.autograd.grad(nll_P.sum(), state, create_graph=True)
            losses.append(nll_P)
            state = state + length_P1 * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            states.append(state - start_PD)
        losses.append(loss_of(state))
        return torch.stack(states, 1), torch.stack(losses, 1)


TERM = StateTerm(section=ReplaySection, kind=Kind.TEMPORAL, module=Replay, residue=2e-2)
