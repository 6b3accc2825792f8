"""What the terms on sampled hidden states share: the teacher's states decoded, the student's gathered, tokens grouped by
segment."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model_taps.slices import State
from student_train.batch import CodedBatch
from student_train.losses.term import Seen


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


@dataclass(frozen=True, slots=True)
class Groups:
    """Sampled states by segment: `index` int64 [G, M] into the P states, `inside` bool [G, M]."""

    index: Tensor
    inside: Tensor

    def of(self, states_PD: Tensor) -> Tensor:
        """[G, M, D], zero outside."""
        return states_PD[self.index] * self.inside[..., None].to(states_PD.dtype)


def groups_of(batch: CodedBatch, max_tokens: int, min_tokens: int) -> Groups:
    """At most `max_tokens` of each segment's sampled states, evenly spread; segments with fewer than `min_tokens` are left out."""
    rows = torch.tensor(batch.hidden_rows, dtype=torch.int64, device=batch.hidden_flat.device)
    start = rows.cumsum(0) - rows
    start, rows = start[rows >= min_tokens], rows[rows >= min_tokens]
    taken = rows.clamp(max=max_tokens)
    place = torch.arange(max_tokens, device=rows.device)
    inside = place < taken[:, None]
    index = start[:, None] + place * rows[:, None] // taken[:, None]
    return Groups(index.where(inside, start[:, None]), inside)


def groups_in(batch: CodedBatch, min_tokens: int) -> int:
    """How many segments `groups_of` keeps."""
    return sum(rows >= min_tokens for rows in batch.hidden_rows)
