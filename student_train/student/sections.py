"""How a recipe says which student is trained. This file does not import torch: a mistake in a recipe is said at once."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from run_kit.recipe_file import ModelName
from signal_store.format.section import Section, Seed


class LoraSection(Section):
    """Train low-rank adapters only (peft, extra `lora`); the result is the adapter's folder."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class StudentSection(Section):
    """A checkpoint to start from, or a config (a mapping with `model_type`, or a folder) whose weights are drawn from `seed`."""

    checkpoint: ModelName | None = None
    config: dict[str, Any] | ModelName | None = None
    seed: Seed = 0
    """Of drawn weights; the run's own `seed` where it is left out."""
    tokenizer: ModelName | None = None
    """Checked against the cache's; None takes the checkpoint's own, or the cache's for a config."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    lora: LoraSection | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("give exactly one of checkpoint and config")
        if self.lora is not None and self.checkpoint is None:
            raise ValueError("lora needs a checkpoint: the adapters' folder would not hold the drawn weights they belong to")
        return self
