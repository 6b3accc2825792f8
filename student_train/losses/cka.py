"""Residual maps: what attention adds to the stream, compared by the similarities between a segment's tokens (REQUIREMENTS 6).

1 - CKA, linear (Kornblith et al. 2019), of any two widths. The usual estimator is biased: of independent noise it is 0.98 where the
width outgrows the tokens; here HSIC₁ of Song et al. 2012, whose mean is zero then. Legend: G segments, M tokens of each.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.spread import Groups
from signal_store.cache import Cache
from student_train.losses.config import ResidualCkaTerm
from student_train.losses.features import GroupedTerm

TINY = 1e-12


class ResidualCka(GroupedTerm):
    """See the module."""

    def __init__(self, section: ResidualCkaTerm, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__("residual_cka", ("attention_output", "attention_output"), section.depth_decay, cache, student)
        self.max_tokens = section.max_tokens

    def group_sum(self, _number: int, own_Pd: Tensor, other_PD: Tensor, groups: Groups) -> Tensor:
        """See the module."""
        if not len(groups.index):
            return 0 * own_Pd.sum()
        return (1 - debiased_cka(groups.of(own_Pd), groups.of(other_PD), groups.inside)).sum()


def debiased_cka(a_GMD: Tensor, b_GME: Tensor, inside_GM: Tensor) -> Tensor:
    """[G]; at least 4 tokens each."""
    first, second = (_gram(x, inside_GM) for x in (a_GMD, b_GME))
    tokens_G = inside_GM.sum(1)
    cross, mine, other = (_hsic(x, y, tokens_G) for x, y in ((first, second), (first, first), (second, second)))
    return cross / (mine.clamp(min=TINY) * other.clamp(min=TINY)).sqrt()


def _gram(states_GMD: Tensor, inside_GM: Tensor) -> Tensor:
    """Similarities of tokens about their mean, at unit scale, none with themselves."""
    inside = inside_GM[..., None].to(states_GMD.dtype)
    centred = (states_GMD - (states_GMD * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)) * inside
    scaled = centred / (centred.square().sum((1, 2), keepdim=True) + TINY).sqrt()
    gram = scaled @ scaled.mT
    return gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))


def _hsic(k_GMM: Tensor, l_GMM: Tensor, tokens_G: Tensor) -> Tensor:
    """HSIC₁ (Song et al. 2012, eq. 5) of Gram matrices with empty diagonals, times n (n - 3)."""
    n = tokens_G.to(k_GMM.dtype)
    trace = (k_GMM * l_GMM).sum((1, 2))
    sums = k_GMM.sum((1, 2)) * l_GMM.sum((1, 2)) / ((n - 1) * (n - 2))
    rows = (k_GMM.sum(2) * l_GMM.sum(2)).sum(1)
    return trace + sums - 2 / (n - 2) * rows
