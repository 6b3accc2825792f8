"""What a recipe says of the weights of tokens. This file does not import torch."""

from typing import Literal

from pydantic import Field

from run_kit.recipe_file import LocalPath
from signal_store.format.section import Section


class ImportanceSection(Section):
    """Weights of the divergences' tokens, in [0.2, 3], by the roles of their words and the teacher's confidence."""

    rules: LocalPath | None = None
    """YAML on top of the shipped rule base."""
    normalise: Literal["weights", "tokens"] = "weights"
    """What the weighted sum is divided by: the weights' sum, which keeps the meaning of a learning rate, or the number of
    tokens."""
    overhead_budget: float = Field(0.037, gt=0)
    """Share of a forward pass that a step may wait for its batch, before the run says so."""
