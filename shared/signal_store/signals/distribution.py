"""The next-token distribution: an exact head, a low-rank tail, true masses at each temperature."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from signal_store.format.arrays import LEVEL, ArraySpec
from signal_store.format.grid import id_dtype
from signal_store.format.section import Temperature
from signal_store.signals.base import Dimensions, Meaning, Signal

DISTRIBUTION_CHUNK_TOKENS = 16_384

SCALARS = ("max_logprob", "label_logprob", "entropy")
"""Columns of `distribution/scalars` before the log mass ratios, one per cached temperature."""

Quality = Literal["lean", "standard", "exact"]

QUALITIES: dict[Quality, tuple[float, float]] = {"lean": (0.65, 12.0), "standard": (0.27, 5.0), "exact": (6e-3, 0.5)}
"""By name: the bounds of T²·KL in nats and of the gradient's angle in degrees, at every cached temperature."""
HEAD_SIZES = (8, 12, 16, 24, 32)
"""Heads that `head: auto` chooses from."""


class DistributionSignal(Signal):
    """The next-token distribution: an exact head, a low-rank tail, true masses at each temperature.

    `rank: auto` takes the fewest bytes (the coarsest quantisation step, and the rank that follows from it) whose T²·KL and
    gradient angle, on calibration tokens that the basis was not fitted on, stay within both bounds at every temperature. With
    `head: auto` the head's size is chosen with it. `quality` names bounds and leaves the head to be chosen; what is given beside
    it stands.
    """

    meanings: ClassVar[tuple[Meaning, ...]] = (
        Meaning(r"distribution/head_ids", "the likeliest tokens, ascending", "id"),
        Meaning(r"distribution/head_codes", "distance below the row's largest log-probability, square-root code", "code"),
        Meaning(r"distribution/tail_codes", "coordinates of the final hidden state; unsigned: zigzag", "code"),
        Meaning(r"distribution/scalars", "log-probabilities, entropy, log of head mass over tail mass by temperature", "nat"),
        Meaning(r"distribution/sampled_ids_(.+)", "tokens drawn at a temperature", "id"),
    )

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

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        """Of the rank that calibration chose; zigzag unless the cache was calibrated before there was such a coding."""
        found = dimensions.calibration
        zigzag = bool(found.get("tail_zigzag"))
        return distribution_arrays(self, found["tail_rank"], dimensions.unit_tokens, dimensions.vocab_size, zigzag=zigzag)


def distribution_arrays(
    signal: DistributionSignal, rank: int, unit_tokens: int, vocab_size: int, *, zigzag: bool = True
) -> tuple[ArraySpec, ...]:
    """Head ids ascending; head codes below the row's maximum; tail codes (`zigzag` where they have 8 bits; older caches hold them
    as int8); scalars per token (half precision).

    The `temperatures` attribute names the columns of `scalars` after those of SCALARS: log(head mass / tail mass) at each.
    """
    columns = len(SCALARS) + len(signal.temperatures)
    scalars = ArraySpec.of(
        "distribution/scalars",
        "float16",
        unit_tokens,
        "token",
        "scalar",
        row_shape=(columns,),
        shuffle="shuffle",
        min_chunk_rows=DISTRIBUTION_CHUNK_TOKENS,
        columns=",".join((*SCALARS, *(f"log_mass_ratio@{t:g}" for t in signal.temperatures))),
    )
    head = (
        ArraySpec.of(
            "distribution/head_ids",
            id_dtype(vocab_size),
            unit_tokens,
            "token",
            "rank",
            row_shape=(signal.head_size,),
            min_chunk_rows=DISTRIBUTION_CHUNK_TOKENS,
        ),
        ArraySpec.of(
            "distribution/head_codes",
            "uint8" if signal.head_bits == 8 else "uint16",
            unit_tokens,
            "token",
            "rank",
            row_shape=(signal.head_size,),
        ),
    )
    zigzag &= signal.tail_bits == 8
    tail = ArraySpec.of(
        "distribution/tail_codes",
        "uint8" if zigzag else "int8" if signal.tail_bits == 8 else "int16",
        unit_tokens,
        "token",
        "direction",
        row_shape=(rank,),
        shuffle="bitshuffle" if zigzag else "noshuffle" if signal.tail_bits == 8 else "shuffle",
        transposed=True,
        level=LEVEL if zigzag else None,
        min_chunk_rows=DISTRIBUTION_CHUNK_TOKENS,
    )
    return (
        scalars,
        *(head if signal.head_size else ()),
        *((tail,) if rank else ()),
        *sampled_arrays(signal, unit_tokens, vocab_size),
    )


def sampled_arrays(signal: DistributionSignal, unit_tokens: int, vocab_size: int) -> tuple[ArraySpec, ...]:
    """Ids drawn from the softened distribution at each temperature, ascending; an id drawn twice stands twice."""
    return tuple(
        ArraySpec.of(
            sampled_path(temperature),
            id_dtype(vocab_size),
            unit_tokens,
            "token",
            "draw",
            row_shape=(signal.samples,),
            shuffle="shuffle",
        )
        for temperature in (signal.temperatures if signal.samples else ())
    )


def sampled_path(temperature: float) -> str:
    """Where the ids drawn at a temperature lie."""
    return f"distribution/sampled_ids_{temperature:g}"
