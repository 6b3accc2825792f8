"""FFN pre-activations as sets: maximum mean discrepancy under a learnable mixture of Gaussians.

k(x, y) = Σ π_m exp(-‖x - y‖² / 2σ_m²), σ_m = (median distance, no gradient) · exp θ_m. Shares and widths *ascend* (gradient
reversal; MMD-GAN, Li et al. 2017): descending, the kernel goes blind. Both sides are LayerNormed and projected by frozen
orthonormal maps, one and the same where the widths agree: a learned map would reach the floor for pure noise too. A segment's
tokens are the set, the same positions on both sides. Legend: G segments, M tokens of each, C Gaussians.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.spread import Groups
from signal_store.cache import Cache
from student_train.losses.features import FeatureSection, GroupedLoss
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import StateTerm, at_least_float32

GAUSSIANS = 5
LARGEST_LOG_WIDTH = math.log(4)


class ActivationMmdSection(FeatureSection):
    """MMD² of FFN pre-activations, as sets of a segment's tokens, under a mixture of Gaussians whose widths and shares ascend; both
    sides LayerNormed and projected by frozen orthonormal maps; mean over segments."""

    weight: WeightField = constant(0.1)
    directions: int = Field(128, ge=1)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx: object, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Kernel(nn.Module):
    """A mixture of Gaussians; what descends on the loss ascends here."""

    def __init__(self) -> None:
        super().__init__()
        self.log_width = nn.Parameter(torch.linspace(-LARGEST_LOG_WIDTH, LARGEST_LOG_WIDTH, GAUSSIANS))
        self.share = nn.Parameter(torch.zeros(GAUSSIANS))

    def forward(self, squared_distance: Tensor, median_G: Tensor) -> Tensor:
        """Σ_c π_c exp(-d² / 2σ_c²), σ_c = median · exp θ_c.

        Args:
            squared_distance: d², float [..., G, M, M].
            median_G: float [G], of the distances.
        Returns:
            Of the shape of `squared_distance`, in (0, 1].
        """
        reverse = _Reversed.apply
        width_GC = median_G[:, None] * reverse(self.log_width).clamp(-LARGEST_LOG_WIDTH, LARGEST_LOG_WIDTH).exp()  # type: ignore[no-untyped-call]
        scale_CG = -0.5 / width_GC.T.square().clamp(min=torch.finfo(torch.float32).tiny)
        share_C = reverse(self.share).softmax(0)  # type: ignore[no-untyped-call]
        powers = (squared_distance[..., None, :, :, :] * scale_CG[:, :, None, None]).exp()
        found: Tensor = (powers * share_C[:, None, None, None]).sum(-4)
        return found


class ActivationMmd(GroupedLoss):
    """A kernel a pair of layers, and maps that no one trains."""

    def __init__(self, section: ActivationMmdSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__("activation_mmd", ("ffn_gate", "ffn_gate"), section.depth_decay, cache, student)
        self.section, self.max_tokens = section, section.max_tokens
        self.kernels = nn.ModuleList(Kernel() for _ in self.pairs)
        self._maps: dict[tuple[int, int, str], Tensor] = {}

    def group_sum(self, number: int, own_Pd: Tensor, other_PD: Tensor, groups: Groups) -> Tensor:
        """Over segments."""
        kernel = self.kernels[number]
        assert isinstance(kernel, Kernel)
        directions = min(self.section.directions, own_Pd.shape[1], other_PD.shape[1])
        own, other = (self._mapped(x, directions) for x in (own_Pd, other_PD))
        if not len(groups.index):
            return 0 * (own.sum() + kernel.log_width.sum() + kernel.share.sum())
        return squared_mmd(groups.of(own), groups.of(other), groups, kernel).sum()

    def _mapped(self, states_PD: Tensor, directions: int) -> Tensor:
        """LayerNorm, then frozen orthonormal directions, drawn by the width alone."""
        width = states_PD.shape[1]
        key = (width, directions, str(states_PD.device))
        if key not in self._maps:
            drawn = torch.randn(width, directions, generator=torch.Generator().manual_seed(width))
            self._maps[key] = torch.linalg.qr(drawn)[0].to(states_PD.device)
        normed = F.layer_norm(at_least_float32(states_PD), (width,))
        mapped: Tensor = normed @ self._maps[key].to(normed.dtype)
        return mapped


def squared_mmd(a_GMD: Tensor, b_GMD: Tensor, groups: Groups, kernel: Kernel) -> Tensor:
    """MMD² = mean_ij k(a_i, a_j) + mean_ij k(b_i, b_j) - 2 mean_ij k(a_i, b_j) of each group, the biased V-statistic.

    Args:
        a_GMD: float32 or float64 [G, M, D], at least one group.
        b_GMD: of the same shape and dtype.
        groups: which of the M places hold something, the same on both sides.
        kernel: takes squared distances [3, G, M, M] and the groups' median distances [G]; the medians carry no gradient.
    Returns:
        Float [G], at least 0, without unit, not reduced.
    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", equation 5.
    """
    inside_GMM = groups.inside[:, :, None] & groups.inside[:, None]
    pairs = [_squared_distances(x, y) for x, y in ((a_GMD, a_GMD), (b_GMD, b_GMD), (a_GMD, b_GMD))]
    with torch.no_grad():
        across = pairs[2].masked_fill(~inside_GMM, torch.nan).flatten(1)
        median_G = across.nanmedian(1).values.clamp(min=1e-12).sqrt()
    share_GMM = inside_GMM / groups.inside.sum(1).square()[:, None, None]
    mine, other, between = (kernel(torch.stack(pairs), median_G) * share_GMM).sum((2, 3))
    found: Tensor = (mine + other - 2 * between).clamp(min=0)
    return found


def _squared_distances(x_GMD: Tensor, y_GMD: Tensor) -> Tensor:
    squares = x_GMD.square().sum(2)[:, :, None] + y_GMD.square().sum(2)[:, None]
    return (squares - 2 * x_GMD @ y_GMD.mT).clamp(min=0)


TERM = StateTerm(
    section=ActivationMmdSection,
    kind=Kind.STRUCTURED,
    module=ActivationMmd,
    residue=1e-4,
    across=True,
    whole_gradient=False,  # the kernel's unit, the median distance, is held constant
)
