"""What every section of a recipe and of a manifest is."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**53)]
"""Whole numbers that JSON carries everywhere."""
DepthFraction = Annotated[float, Field(gt=0, lt=1)]
Temperature = Annotated[float, Field(ge=0.05, le=100)]
Rank = Annotated[int, Field(ge=1, le=2**20)]


class Section(BaseModel):
    """Base of every recipe section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
