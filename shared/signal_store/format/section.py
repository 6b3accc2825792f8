"""What every section of a recipe and of a manifest is."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from signal_store.format.renamed import by_current_names

Seed = Annotated[int, Field(ge=0, lt=2**53)]
"""Whole numbers that JSON carries everywhere."""
DepthFraction = Annotated[float, Field(gt=0, lt=1)]
Temperature = Annotated[float, Field(ge=0.05, le=100)]
Rank = Annotated[int, Field(ge=1, le=2**20)]


class Section(BaseModel):
    """Base of every recipe section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """By key of before, today's; see `signal_store.format.renamed`."""

    @model_validator(mode="before")
    @classmethod
    def _by_current_keys(cls, content: Any) -> Any:
        return by_current_names(content, cls.renamed, "recipe") if cls.renamed and isinstance(content, Mapping) else content

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: object, info: ValidationInfo) -> object:
        """`true` is no number, though Python takes it for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("true and false (yes, no, on, off) are no value of this key")
        return value
