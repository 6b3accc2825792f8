"""Smooth paths: how far the last state moves from token to token, the later in the response the less (REQUIREMENTS 30).

(t / t_ref) · ‖h_t - h_{t-1}‖² over the variance of the segment's states about their mean: divided by ‖h‖² it would be gamed by a
constant offset. `relative`: only what exceeds the teacher's own, of the deepest cached layer; standing still then earns nothing.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.data.batch import CodedBatch
from student_train.data.reader import Needs
from student_train.losses.config import SmoothnessTerm
from student_train.losses.features import teacher_states
from student_train.losses.level import Level, TokenLosses
from student_train.losses.pairing import LayerPair, state_pairs
from student_train.losses.rows import segment_of_row
from student_train.losses.term import Reads, Seen

TINY = 1e-12


class Smoothness(Level):
    """See the module."""

    def __init__(self, section: SmoothnessTerm, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        self.section = section
        self.pair: LayerPair | None = None
        self.reads = Reads()
        if section.relative:
            signal = cache.manifest.signals.hidden
            self.pair = state_pairs("smoothness", "block_output", cache, student)[-1]
            if signal is None or signal.positions != "all":
                raise MismatchError(
                    "smoothness: the teacher's path is not whole in the cache",
                    expected="signals.hidden.positions: all",
                    found=None if signal is None else signal.positions,
                    where=cache.uri,
                    remedy="Set losses.smoothness.relative: false, or build a cache with all positions.",
                )
            needs = Needs(False, (("block_output", self.pair.teacher),), ())
            self.reads = Reads(needs, (("block_output", self.pair.student),))

    def count(self, batch: CodedBatch) -> int:
        """Tokens that count."""
        return len(batch.flat)

    def per_token(self, seen: Seen) -> TokenLosses:
        """A token whose predecessor does not count adds nothing."""
        batch = seen.batch
        segment_N, place_N, follows_N = places_of(batch)
        segments = len(batch.segment_rows)
        if self.pair is None:
            excess_N = moved(seen.final[batch.flat].float(), segment_N, segments, follows_N)
        else:
            own = seen.states["block_output", self.pair.student].flatten(0, 1)[batch.flat].float()
            index = batch.hidden_flat.new_zeros(batch.input_ids.numel())
            index[batch.hidden_flat] = torch.arange(len(batch.hidden_flat), device=index.device)
            other = teacher_states(seen, ("block_output", self.pair.teacher))[index[batch.flat]]
            both = (moved(states, segment_N, segments, follows_N) for states in (own, other))
            mine_N, theirs_N = both
            excess_N = (mine_N - theirs_N).clamp(min=0)
        return TokenLosses(batch.flat, excess_N * place_N / self.section.reference_tokens)


def places_of(batch: CodedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of the N rows that count: number of the segment, place among its rows, and whether the row before is the token before."""
    rows = torch.tensor(batch.segment_rows, dtype=torch.int64, device=batch.flat.device)
    segment_N = segment_of_row(batch)
    place_N = torch.arange(len(batch.flat), device=rows.device) - (rows.cumsum(0) - rows)[segment_N]
    follows_N = torch.zeros_like(place_N, dtype=torch.bool)
    follows_N[1:] = (batch.flat[1:] == batch.flat[:-1] + 1) & (place_N[1:] > 0)
    return segment_N, place_N, follows_N


def moved(states_ND: Tensor, segment_N: Tensor, segments: int, follows_N: Tensor) -> Tensor:
    """‖h_t - h_{t-1}‖² over the mean squared distance of the segment's states from their mean [N]; 0 where nothing precedes."""
    counts = torch.bincount(segment_N, minlength=segments).clamp(min=1).to(states_ND)
    mean = states_ND.new_zeros(segments, states_ND.shape[1]).index_add(0, segment_N, states_ND) / counts[:, None]
    squares_N = (states_ND - mean[segment_N]).square().sum(1)
    variance = states_ND.new_zeros(segments).index_add(0, segment_N, squares_N) / counts
    steps_N = torch.zeros_like(squares_N)
    steps_N[1:] = (states_ND[1:] - states_ND[:-1]).square().sum(1)
    return steps_N * follows_N / (variance[segment_N] + TINY)
