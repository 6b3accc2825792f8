"""How a recipe says what the optimizer does and when a run's state is kept. This file does not import torch."""

from typing import Annotated

from pydantic import Field

from signal_store.format.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW with linear warm-up and cosine decay, counted in optimizer steps."""

    learning_rate: float = Field(2e-5, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(0, ge=0)
    """More than the run has are taken, and said: a trial of a few steps warms up as the run that it tries."""
    min_factor: float = Field(0.0, ge=0, le=1)
    """Of the learning rate, at the end of the cosine."""
    clip_norm: float | None = Field(1.0, gt=0)


class CheckpointSection(Section):
    """State to resume from, every n steps; the last `keep` stay."""

    every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    accept_other_cache: bool = False
    """Go on from a checkpoint of another cache or recipe, at the beginning of this one's stream."""
