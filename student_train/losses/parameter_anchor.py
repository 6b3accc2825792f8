"""The anchor of the parameters: ‖θ - θ₀‖² / ‖θ₀‖² over the student's trainable ones, θ₀ where the run began (L2-SP, Li et al.
2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks").

It counts no token and needs no forward pass: value and gradient are in closed form, and the gradient joins those of the losses
after the last backward pass. Works shard by shard.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from signal_store.format.section import Section
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import RegularisationTerm


class ParameterAnchorSection(Section):
    """‖θ - θ₀‖² / ‖θ₀‖², θ₀ the weights that the run began with (L2-SP)."""

    weight: WeightField = constant(0.01)


@dataclass(frozen=True)
class Anchor:
    """`start` θ₀, as the parameters lie on this rank."""

    parameters: list[nn.Parameter]
    start: list[Tensor]
    squared_norm: float

    @classmethod
    def of(cls, student: nn.Module, start: Mapping[str, Tensor], like: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """`start`: whole parameters by name, as they were before any training; `like(whole, parameter)`: the first, sharded as the
        second is."""
        named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        mine = [like(start[name].to(p.device), p).to(p.device) for name, p in named]  # shards may be offloaded
        return cls([p for _, p in named], mine, sum(float(start[name].double().square().sum()) for name, _ in named))

    @torch.no_grad()
    def pull(self, weight: float) -> float:
        """Add weight · 2 (θ - θ₀) / ‖θ₀‖² to the parameters' gradients.

        Returns:
            ‖θ - θ₀‖² / ‖θ₀‖² over all shards, before the weight; sums in float64.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        for parameter, start in zip(self.parameters, self.start, strict=True):
            apart = parameter.detach() - start
            squares = apart.double().square().sum()
            total += (squares.full_tensor() if isinstance(squares, DTensor) else squares).to(total.device)
            pull = apart * (2 * weight / self.squared_norm)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
        return float(total) / self.squared_norm


TERM = RegularisationTerm(section=ParameterAnchorSection, about="the parameters' scale")
