"""The weight of a term as a function of progress p = optimizer step / total steps, in [0, 1]."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from signal_store.format.section import Section


class Weight(Section):
    """Linear from `start` to `end` while p goes from `begin` to `until`; constant before and after."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    begin: float = Field(0.0, ge=0, le=1)
    until: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.begin >= self.until:
            raise ValueError(f"begin must be below until, found {self.begin} and {self.until}")
        return self

    def at(self, progress: float) -> float:
        """The weight at a progress."""
        share = min(1.0, max(0.0, (progress - self.begin) / (self.until - self.begin)))
        return self.start + (self.end - self.start) * share

    def __str__(self) -> str:
        if self.start == self.end:
            return f"{self.start:g}"
        return f"{self.start:g} to {self.end:g} over p = {self.begin:g}..{self.until:g}"


def _from_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        number = float(value)  # of YAML's numbers, 1e-3 is a string
    except ValueError:
        raise ValueError("expected a number, or start and end (begin, until)") from None
    return {"start": number, "end": number}


def constant(value: float) -> Weight:
    """The same weight all along."""
    return Weight(start=value, end=value)


WeightField = Annotated[Weight, BeforeValidator(_from_number)]
"""A number (constant), or a mapping with the fields of Weight."""
