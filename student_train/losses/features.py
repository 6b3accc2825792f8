"""What the terms on sampled hidden states share: layers in pairs, the teacher's states decoded, the student's gathered, tokens
grouped by segment."""

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.slices import State
from model_taps.spread import Groups, evenly
from signal_store.cache import Cache
from signal_store.signals import Tap
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.hidden import HiddenPart, HiddenRequest
from student_train.losses.pairing import depth_weights, state_pairs
from student_train.losses.term import Reads, StateLoss, StudentOutputs, TermSection

MIN_TOKENS = 8
"""Fewer say too little of a set."""


class FeatureSection(TermSection):
    """Settings of a term on states of paired layers. Layer i of them, the shallowest first, weighs γ^i / Σγ^j."""

    depth_decay: float = Field(0.7, gt=0, le=1)
    """γ at the start; it goes to 1 linearly, so that deep layers are learned later."""
    max_tokens: int = Field(64, ge=8)
    """Of a segment's sampled tokens, evenly spread."""


class PairedLoss(StateLoss):
    """A term on the sampled states of every cached layer of a tap and of the student's layer at the same depth, in float32 whatever
    the autocast. Layers weigh `decay`^i at first, the shallowest (i = 0) most, and alike at the end."""

    max_tokens: int | None = None
    """Of a segment, evenly spread; None takes all sampled ones."""

    def __init__(self, name: str, taps: tuple[Tap, Tap], decay: float, cache: Cache, student: PreTrainedModel) -> None:
        """`taps`: the student's and the teacher's."""
        super().__init__()
        self.own_tap, self.tap = taps
        self.decay = decay
        self.pairs = state_pairs(name, self.tap, cache, student, own_tap=self.own_tap)
        self.own_width: int = student.config.get_text_config().hidden_size
        needs = SignalRequest.of(HiddenRequest(tuple((self.tap, p.teacher) for p in self.pairs)))
        self.reads = Reads(needs, tuple((self.own_tap, p.student) for p in self.pairs))

    def count(self, batch: CodedBatch) -> int:
        """Tokens."""
        return sum(rows if self.max_tokens is None else min(rows, self.max_tokens) for rows in HiddenPart.of(batch).segment_rows)

    def forward(self, outputs: StudentOutputs) -> Tensor:
        """Layers weighed by depth."""
        weights = depth_weights(len(self.pairs), self.decay, outputs.progress)
        kept = self.kept(outputs.batch)
        with torch.autocast(outputs.final.device.type, enabled=False):
            parts = [weight * self._of_pair(number, kept, outputs) for number, weight in enumerate(weights)]
            return torch.stack(parts).sum()

    def kept(self, batch: CodedBatch) -> Tensor | None:
        """int64, which of the sampled states it looks at; None for all."""
        part = HiddenPart.of(batch)
        if self.max_tokens is None or max(part.segment_rows, default=0) <= self.max_tokens:
            return None
        groups = evenly(torch.tensor(part.segment_rows, dtype=torch.int64), self.max_tokens)
        return groups.index[groups.inside].to(part.flat.device)

    def _of_pair(self, number: int, kept: Tensor | None, outputs: StudentOutputs) -> Tensor:
        pair = self.pairs[number]
        other_PD = teacher_states(outputs, (self.tap, pair.teacher), kept)
        own_Pd = student_states(outputs, (self.own_tap, pair.student), kept).to(other_PD.dtype)
        return self.pair_sum(number, own_Pd, other_PD, outputs)

    @abstractmethod
    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, outputs: StudentOutputs) -> Tensor:
        """Its sum over one pair of layers, the `number`-th; scalar."""


class GroupedLoss(PairedLoss):
    """A paired term that looks at a segment's tokens together, where there are at least `MIN_TOKENS` of them."""

    max_tokens: int

    def count(self, batch: CodedBatch) -> int:
        """Segments with enough sampled tokens."""
        return sum(rows >= MIN_TOKENS for rows in HiddenPart.of(batch).segment_rows)

    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, outputs: StudentOutputs) -> Tensor:
        """Over segments."""
        rows = torch.tensor(HiddenPart.of(outputs.batch).segment_rows, dtype=torch.int64).clamp(max=self.max_tokens)
        return self.group_sum(number, own_Pd, other_PD, evenly(rows, self.max_tokens, MIN_TOKENS).to(own_Pd.device))

    @abstractmethod
    def group_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, groups: Groups) -> Tensor:
        """Its sum over segments, of one pair of layers; scalar."""


def teacher_states(outputs: StudentOutputs, state: State, kept: Tensor | None = None) -> Tensor:
    """The teacher's states, decoded.

    Args:
        outputs: with the batch's codes and the codec of that tap and layer.
        state: the teacher's tap and layer.
        kept: int64, which of the sampled tokens; None for all.
    Returns:
        float32 [P, d], in the model's own units; [0, d] where the batch has none.
    """
    codec = outputs.codecs.hidden[state]
    codes = HiddenPart.of(outputs.batch).states.get(state)
    if codes is None:
        return codec.mean.new_zeros(0, len(codec.mean))
    values, scale = (codes.values, codes.scale) if kept is None else (codes.values[kept], codes.scale[kept])
    return codec.decode(values, scale)


def student_states(outputs: StudentOutputs, state: State, kept: Tensor | None = None) -> Tensor:
    """[P, d] of the same tokens, in the graph."""
    flat = HiddenPart.of(outputs.batch).flat
    wanted = flat if kept is None else flat[kept]
    return outputs.states[state].flatten(0, -2)[wanted]  # some families walk their FFN without the batch axis


def in_channel_units(outputs: StudentOutputs, state: State, states_PD: Tensor) -> Tensor:
    """(h - mean) / spread, channel by channel as calibrated on the teacher: a massive channel is one among others.

    Args:
        outputs: with the codec of that tap and layer.
        state: the teacher's tap and layer.
        states_PD: its states, or the student's mapped onto its width [P, D], any float dtype.
    Returns:
        [P, D] in the codec's dtype, float32.
    """
    codec = outputs.codecs.hidden[state]
    return (states_PD.to(codec.mean.dtype) - codec.mean) / codec.spread


def make_projection(width: int, target_width: int) -> nn.Linear:
    """Bias-free; the identity where the widths agree, else orthonormal rows or columns."""
    projection = nn.Linear(width, target_width, bias=False)
    if width == target_width:
        nn.init.eye_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight)
    return projection
