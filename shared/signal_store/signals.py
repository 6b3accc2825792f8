"""The recipe of signals: what of the teacher's thought is written down. Part of a cache's identity."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Seed = Annotated[int, Field(ge=0, lt=2**53)]
"""Whole numbers that JSON carries everywhere."""
DepthFraction = Annotated[float, Field(gt=0, lt=1)]
Temperature = Annotated[float, Field(ge=0.05, le=100)]
Rank = Annotated[int, Field(ge=1, le=2**20)]

MOST_COVERAGE_WORDS = 256
"""Key words of a prompt that a plan keeps, and that a coverage signal may ask for."""
DEFAULT_KEYWORDS = ("def", "class", "if", "elif", "else", "for", "while", "return", "try", "except", "with")


class Section(BaseModel):
    """Base of every recipe section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: object, info: ValidationInfo) -> object:
        """`true` is no number, though Python takes it for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("true and false (yes, no, on, off) are no value of this key")
        return value


Quality = Literal["lean", "standard", "exact"]

QUALITIES: dict[Quality, tuple[float, float]] = {"lean": (0.65, 12.0), "standard": (0.27, 5.0), "exact": (6e-3, 0.5)}
"""By name: the bounds of T²·KL in nats and of the gradient's angle in degrees, at every cached temperature."""
HEAD_SIZES = (8, 12, 16, 24, 32)
"""Heads that `head: auto` chooses from."""


class DistributionSignal(Section):
    """The next-token distribution: an exact head, a low-rank tail, true masses at each temperature (DESIGN 5).

    `rank: auto` takes the fewest bytes (the coarsest quantisation step, and the rank that follows from it) whose T²·KL and
    gradient angle, on calibration tokens that the basis was not fitted on, stay within both bounds at every temperature. With
    `head: auto` the head's size is chosen with it. `quality` names bounds and leaves the head to be chosen; what is given beside
    it stands.
    """

    quality: Quality | None = None
    """`lean`, `standard` or `exact`; None is what the bounds below say."""
    head: Annotated[int, Field(ge=0, le=65_536)] | Literal["auto"] = 16
    """k, the token ids whose probability is stored each for itself; 0 for none."""
    head_bits: Literal[8, 16] = 8
    rank: int | Literal["auto"] = "auto"
    """r, the directions of the final hidden state that are stored; 0 leaves the tail one bucket."""
    tail_bits: Literal[8, 16] = 8
    temperatures: tuple[Temperature, ...] = (1.0, 2.0, 3.0, 4.0)
    max_scaled_kl_nats: float = Field(6e-3, gt=0)
    max_angle_degrees: float = Field(0.5, gt=0)
    samples: int = Field(0, ge=0, le=4096)
    """Token ids drawn from the softened distribution at each temperature, per token (Random Sampling KD, arXiv:2503.16870); 0
    for none. They make a pure head unbiased at temperatures where it holds little."""

    @model_validator(mode="before")
    @classmethod
    def _named_quality(cls, content: Any) -> Any:
        """Write out what a quality stands for, so that what is stored says it itself."""
        if not isinstance(content, dict) or content.get("quality") not in QUALITIES:
            return content
        kl, angle = QUALITIES[content["quality"]]
        searched = content.get("rank", "auto") == "auto"
        named = {"max_scaled_kl_nats": kl, "max_angle_degrees": angle, **({"head": "auto"} if searched else {})}
        return {**named, **content}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.rank, int) and not 0 <= self.rank <= 2**20:
            raise ValueError("rank must be at least 0, or auto")
        if self.head == 0 and self.rank == 0:
            raise ValueError("head and rank are both 0: nothing would be stored")
        if self.head == "auto" and self.rank != "auto":
            raise ValueError("head: auto is chosen together with rank: auto; beside a rank, give a number")
        if self.quality is not None and self.rank != "auto":
            raise ValueError("quality is for rank: auto; a rank that is given has the fidelity that it has")
        if len(set(self.temperatures)) != len(self.temperatures) or 1.0 not in self.temperatures:
            raise ValueError("temperatures must be distinct and hold 1")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Of T²·KL in nats and of the angle in degrees."""
        return self.max_scaled_kl_nats, self.max_angle_degrees

    def head_sizes(self, vocab_size: int) -> tuple[int, ...]:
        """The heads to choose from, ascending: one, unless it is `auto`; none is larger than the vocabulary."""
        sizes = HEAD_SIZES if self.head == "auto" else (self.head,)
        return tuple(sorted({min(size, vocab_size) for size in sizes}))

    @property
    def head_size(self) -> int:
        """k of a signal whose head is settled, as a manifest's always is."""
        assert self.head != "auto", "the head is chosen in calibration"
        return self.head


Tap = Literal["block_input", "attention_output", "ffn_input", "ffn_gate", "ffn_activation", "block_output"]
"""Places of a transformer block (REQUIREMENTS 23): its input, the attention's output before the residual is added, the normalised
input of the FFN, the FFN before its nonlinearity, what its down-projection reads, and the block's output."""


class EveryNth(Section):
    """Every n-th token of a segment, counted from its first."""

    every: int = Field(ge=1, lt=2**31)


class RandomFraction(Section):
    """A seeded random share of each segment's tokens."""

    fraction: float = Field(gt=0, le=1)
    seed: Seed = 0


class Stratified(Section):
    """All keyword tokens, and a seeded random rest up to this share of each segment's tokens."""

    stratified: float = Field(gt=0, le=1)
    seed: Seed = 0


Positions = Literal["all", "keywords"] | EveryNth | RandomFraction | Stratified


class HiddenSignal(Section):
    """Hidden states at one or more taps, at depth fractions of the teacher or at numbered layers (1 is the first block)."""

    taps: tuple[Tap, ...] = Field(("block_output",), min_length=1)
    depths: tuple[DepthFraction, ...] = Field((0.25, 0.5, 0.75), min_length=1)
    layers: tuple[int, ...] | None = Field(None, min_length=1)
    positions: Positions = "all"
    """Which tokens, fixed when the plan is made: `all`, `keywords`, `{every: n}`, `{fraction: f}` or `{stratified: f}`."""
    rank: Rank | None = None
    """Principal directions kept; None keeps the full width."""
    values: Literal["int8", "float16"] = "int8"
    """How a coordinate is stored, in units of its row's scale."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.taps)) != len(self.taps):
            raise ValueError("a tap is named twice")
        _check_layers(self)
        return self


class AttentionSignal(Section):
    """Attention rows of keyword tokens (as query): chosen or the most focused heads of chosen softmax-attention layers."""

    layers: tuple[int, ...] | Literal["last"] = "last"
    """Blocks by number, 1 the first; `last` is the last block that has softmax attention."""
    heads: int | tuple[int, ...] = 3
    """How many of the most focused heads, found in calibration; or their numbers, from 0."""
    keywords: tuple[str, ...] = DEFAULT_KEYWORDS
    previous_steps: int = Field(0, ge=0, le=64)
    """Rows of this many tokens before each keyword are stored too (REQUIREMENTS 31)."""
    max_columns: int | None = Field(None, ge=1, lt=2**31)
    """Store only the m heaviest columns of a row and its residual mass. None: 64 where the context exceeds 1,024, else all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (isinstance(self.heads, int) and self.heads < 1) or self.heads == ():
            raise ValueError("heads must be at least one")
        if self.layers == () or not self.keywords:
            raise ValueError("layers and keywords must name at least one")
        for name in ("layers", "heads"):
            chosen = getattr(self, name)
            if isinstance(chosen, tuple) and len(set(chosen)) != len(chosen):
                raise ValueError(f"{name} names one twice")
        return self


class StatsSignal(Section):
    """Small statistics of each segment (REQUIREMENTS 5, 39), float16, at the layers of `hidden`'s defaults or as numbered."""

    attention: bool = True
    """Per layer and head: normalised entropy, look-back, largest mass, mass on the first token; mean over every 16th row."""
    ffn: bool = True
    """Per layer: share of FFN activations below a hundredth of their root mean square, and Hoyer's sparsity."""
    gradient: bool = False
    """Per layer: log10 of the variance of the loss's gradient with respect to the block's output. Needs a backward pass."""
    depths: tuple[DepthFraction, ...] = Field((0.25, 0.5, 0.75), min_length=1)
    layers: tuple[int, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.attention or self.ffn or self.gradient):
            raise ValueError("attention, ffn and gradient are all off: nothing would be stored")
        _check_layers(self)
        return self


class ReplaySignal(Section):
    """The path of a final hidden state up the gradient of its own loss, through final norm and output head alone, at sampled
    positions of finished texts (REQUIREMENTS 32, 33); with `gradient`, also the loss's gradient at the layers of `hidden`."""

    steps: int = Field(4, ge=1, le=64)
    step_size: float = Field(0.1, gt=0, le=10)
    """Length of a step, as a share of the state's own length."""
    positions_per_segment: int = Field(4, ge=1, lt=2**31)
    share: float = Field(1.0, gt=0, le=1)
    """Of the finished texts, those that are sampled, each drawn by its own tokens and the seed."""
    seed: Seed = 0
    gradient: bool = False
    depths: tuple[DepthFraction, ...] = Field((0.25, 0.5, 0.75), min_length=1)
    layers: tuple[int, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_layers(self)
        return self


class EvidenceSignal(Section):
    """Which sentences of a question its answer looks at (REQUIREMENTS 7), of sources with `task: qa`: the share of attention that
    each sentence of the prompt gets from the answer's rows, at the layers with softmax attention among those at these depths."""

    depths: tuple[DepthFraction, ...] = Field((0.5, 0.75), min_length=1)
    layers: tuple[int, ...] | None = Field(None, min_length=1)
    queries: int = Field(32, ge=1, le=65_536)
    """Rows of the answer that are looked at, evenly spread."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_layers(self)
        return self


class CoverageSignal(Section):
    """Which key words of a text its summary says (REQUIREMENTS 8), of sources with `task: summary` and a tagger: the probability
    that a word of the prompt, told by its first token, comes up in one of the summary's rows at least."""

    words: int = Field(32, ge=1, le=MOST_COVERAGE_WORDS)
    """Nouns and names of a segment's prompt, of code its identifiers, the most frequent first."""


def _check_layers(signal: "HiddenSignal | StatsSignal | ReplaySignal | EvidenceSignal") -> None:
    if signal.layers is not None and signal.depths != type(signal).model_fields["depths"].default:
        raise ValueError("depths and layers exclude each other")
    if signal.layers is not None and len(set(signal.layers)) != len(signal.layers):
        raise ValueError("layers names one twice")


class Signals(Section):
    """Which signals are cached; a signal left out is not."""

    distribution: DistributionSignal | None = DistributionSignal.model_validate({})
    hidden: HiddenSignal | None = None
    attention: AttentionSignal | None = None
    stats: StatsSignal | None = None
    replay: ReplaySignal | None = None
    evidence: EvidenceSignal | None = None
    coverage: CoverageSignal | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if all(signal is None for _, signal in self):
            raise ValueError("every signal is off: nothing would be stored")
        return self
