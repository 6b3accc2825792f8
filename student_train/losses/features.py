"""What the terms on sampled hidden states share: layers in pairs, the teacher's states decoded, the student's gathered, tokens
grouped by segment."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.slices import State
from model_taps.spread import Groups, evenly
from signal_store.cache import Cache
from signal_store.signals import Tap
from student_train.batch import CodedBatch
from student_train.losses.pairing import LayerPair, depth_weights, state_pairs
from student_train.losses.term import Reads, Seen, StateTerm
from student_train.stream.reader import Needs


class PairedTerm(StateTerm):
    """A term on the sampled states of every cached layer of a tap and of the student's layer at the same depth, in float32 whatever
    the autocast. Layers weigh `decay`^i at first, the shallowest (i = 0) most, and alike at the end (27)."""

    def __init__(self, name: str, taps: tuple[Tap, Tap], decay: float, cache: Cache, student: PreTrainedModel) -> None:
        """`taps`: the student's and the teacher's."""
        super().__init__()
        self.own_tap, self.tap = taps
        self.decay = decay
        self.pairs = state_pairs(name, self.tap, cache, student, own_tap=self.own_tap)
        self.own_width: int = student.config.get_text_config().hidden_size
        needs = Needs(False, tuple((self.tap, p.teacher) for p in self.pairs), ())
        self.reads = Reads(needs, tuple((self.own_tap, p.student) for p in self.pairs))

    def count(self, batch: CodedBatch) -> int:
        """Sampled tokens."""
        return len(batch.hidden_flat)

    def forward(self, seen: Seen) -> Tensor:
        """Layers weighed by depth."""
        weights = depth_weights(len(self.pairs), self.decay, seen.progress)
        with torch.autocast(seen.final.device.type, enabled=False):
            parts = [
                weight * self._of_pair(number, pair, seen)
                for number, (pair, weight) in enumerate(zip(self.pairs, weights, strict=True))
            ]
            return torch.stack(parts).sum()

    def _of_pair(self, number: int, pair: LayerPair, seen: Seen) -> Tensor:
        own_Pd, other_PD = student_states(seen, (self.own_tap, pair.student)), teacher_states(seen, (self.tap, pair.teacher))
        return self.pair_sum(number, own_Pd.to(other_PD.dtype), other_PD, seen)

    @abstractmethod
    def pair_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, seen: Seen) -> Tensor:
        """Its sum over one pair of layers, the `number`-th; scalar."""


def teacher_states(seen: Seen, state: State) -> Tensor:
    """float32 [P, d] as the cache gives them."""
    codec = seen.codecs.hidden[state]
    codes = seen.batch.hidden.get(state)
    return codec.mean.new_zeros(0, len(codec.mean)) if codes is None else codec.decode(codes.values, codes.scale)


def student_states(seen: Seen, state: State) -> Tensor:
    """[P, d] of the same tokens, in the graph."""
    return seen.states[state].flatten(0, -2)[seen.batch.hidden_flat]  # some families walk their FFN without the batch axis


def in_channel_units(seen: Seen, state: State, states_PD: Tensor) -> Tensor:
    """States less the calibrated mean of each channel, over its spread: a massive channel is one among others."""
    codec = seen.codecs.hidden[state]
    return (states_PD.to(codec.mean.dtype) - codec.mean) / codec.spread


def make_projection(width: int, target_width: int) -> nn.Linear:
    """Bias-free; the identity where the widths agree, else orthonormal rows or columns."""
    projection = nn.Linear(width, target_width, bias=False)
    if width == target_width:
        nn.init.eye_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight)
    return projection


def groups_of(batch: CodedBatch, max_tokens: int, min_tokens: int) -> Groups:
    """At most `max_tokens` of each segment's sampled states, evenly spread; segments with fewer than `min_tokens` are left out."""
    rows = torch.tensor(batch.hidden_rows, dtype=torch.int64, device=batch.hidden_flat.device)
    return evenly(rows, max_tokens, min_tokens)


def groups_in(batch: CodedBatch, min_tokens: int) -> int:
    """How many segments `groups_of` keeps."""
    return sum(rows >= min_tokens for rows in batch.hidden_rows)
