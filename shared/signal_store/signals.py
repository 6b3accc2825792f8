"""The recipe of signals: what of the teacher's thought is written down. Part of a cache's identity."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DepthFraction = Annotated[float, Field(gt=0, lt=1)]
Temperature = Annotated[float, Field(gt=0, le=100)]

DEFAULT_KEYWORDS = ("def", "class", "if", "elif", "else", "for", "while", "return", "try", "except", "with")


class Section(BaseModel):
    """Base of every recipe section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DistributionSignal(Section):
    """The next-token distribution: an exact head, a low-rank tail, true masses at each temperature (DESIGN 5).

    `rank: auto` takes the fewest bits (the coarsest quantisation step, and the rank that follows from it) whose T²·KL and
    gradient angle, on calibration tokens that the basis was not fitted on, stay within both bounds at every temperature.
    """

    head: int = Field(16, ge=0, le=65_536)
    """k, the token ids whose probability is stored each for itself; 0 for none."""
    head_bits: Literal[8, 16] = 8
    rank: int | Literal["auto"] = "auto"
    """r, the directions of the final hidden state that are stored; 0 leaves the tail one bucket."""
    tail_bits: Literal[8, 16] = 8
    temperatures: tuple[Temperature, ...] = (1.0, 2.0, 3.0, 4.0)
    max_scaled_kl_nats: float = Field(6e-3, gt=0)
    max_angle_degrees: float = Field(0.5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.rank, int) and self.rank < 0:
            raise ValueError("rank must be at least 0, or auto")
        if self.head == 0 and self.rank == 0:
            raise ValueError("head and rank are both 0: nothing would be stored")
        if len(set(self.temperatures)) != len(self.temperatures) or 1.0 not in self.temperatures:
            raise ValueError("temperatures must be distinct and hold 1")
        return self


class HiddenSignal(Section):
    """Outputs of transformer blocks, at depth fractions of the teacher or at numbered layers (1 is the first block's output)."""

    depths: tuple[DepthFraction, ...] = (0.25, 0.5, 0.75)
    layers: tuple[int, ...] | None = None
    every: int = Field(1, ge=1)
    """Every n-th token of a segment, counted from its first; 1 stores all."""
    rank: int | None = Field(None, ge=1)
    """Principal directions kept; None keeps the full width."""


class AttentionSignal(Section):
    """Attention rows of keyword tokens (as query): the most focused heads of chosen softmax-attention layers."""

    layers: tuple[int, ...] | Literal["last"] = "last"
    """Blocks by number, 1 the first; `last` is the last block that has softmax attention."""
    heads: int = Field(3, ge=1)
    keywords: tuple[str, ...] = DEFAULT_KEYWORDS
    max_columns: int | None = Field(None, ge=1)
    """Store only the m heaviest columns of a row and its residual mass. None: 64 where the context exceeds 1,024, else all."""


class Signals(Section):
    """Which signals are cached; a signal left out is not."""

    distribution: DistributionSignal | None = DistributionSignal.model_validate({})
    hidden: HiddenSignal | None = None
    attention: AttentionSignal | None = None
