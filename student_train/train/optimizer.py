"""AdamW, and its learning rate by step."""

import math

import torch
from torch import nn

from student_train.train.sections import OptimizerSection


def learning_rate_factor(step: int, steps: int, config: OptimizerSection) -> float:
    """Linear warm-up, then half a cosine to `min_factor` (Loshchilov & Hutter 2017, eq. 5, without restarts).

    Args:
        step: finished optimizer steps, in [0, steps].
    Returns:
        what the learning rate is multiplied by, in (0, 1].
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_factor + (1 - config.min_factor) * 0.5 * (1 + math.cos(math.pi * share))


def build_optimizer(module: nn.Module, config: OptimizerSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused, over every trainable parameter, the terms' own included; vectors do not decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of every group, for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
