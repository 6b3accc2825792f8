"""Linear CKA (Kornblith et al. 2019), by an estimator that is not fooled by wide noise.

The usual estimator is biased: of independent noise it is 0.98 where the width outgrows the tokens; here HSIC₁, whose mean is zero
then. Legend: G segments, M tokens of each.
"""

import torch
from torch import Tensor

TINY = 1e-12


def debiased_cka(a_GMD: Tensor, b_GME: Tensor, inside_GM: Tensor) -> Tensor:
    """HSIC₁(A, B) / √(HSIC₁(A, A) HSIC₁(B, B)), of the Gram matrices of the tokens' centred states.

    Args:
        a_GMD: float32 or float64 [G, M, D].
        b_GME: [G, M, E] of the same dtype.
        inside_GM: bool, which of the M places hold a token; at least 4 of each group, or the value is not finite.
    Returns:
        Float [G], 1 where the one is a rotation and scaling of the other, about 0 for independent ones; not reduced.
    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", equation 4; Song et al. 2012, "Feature
    Selection via Dependence Maximization", for HSIC₁.
    """
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
    """HSIC₁ of Gram matrices with empty diagonals, times n (n - 3)."""
    n = tokens_G.to(k_GMM.dtype)
    trace = (k_GMM * l_GMM).sum((1, 2))
    sums = k_GMM.sum((1, 2)) * l_GMM.sum((1, 2)) / ((n - 1) * (n - 2))
    rows = (k_GMM.sum(2) * l_GMM.sum(2)).sum(1)
    return trace + sums - 2 / (n - 2) * rows
