"""How a recipe says when a student is validated, and when that ends its run. This file does not import torch."""

from pydantic import Field

from signal_store.format.section import Section


class ValidationSection(Section):
    """Loss on the cache's validation split, every n steps and at the end."""

    every: int = Field(500, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    fidelity: bool = True
    """Also compare with the cached teacher, where the cache holds the distribution."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many validations in a row without a better one."""
    min_gain: float = Field(0.0, ge=0)
