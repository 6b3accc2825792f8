"""What a signal is on the teacher's side: where it is taken, what it reads of the teacher, what calibration fits for it, and how
the answers to a batch become rows of its arrays.

A signal is a file of this folder, named as its section in `signal_store/signals/`, with one class of `SignalExtractor`; `registry`
finds it. Most signals need few of the methods: `extract`, and of one that is sampled `positions`. Everything that depends on a
unit's plan is fixed before the teacher runs. What calibration decides of a signal are its *facts*: JSON, kept in the
calibration's document and in the manifest.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from signal_store.errors import InputError
from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.manifest import Manifest
from signal_store.signals import Dimensions, Signal
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.extracted import Extracted, Rows
from teacher_cache.signals.unit_work import Places, SignalBatch, UnitWork
from teacher_cache.teacher.forward import NO_PLACES, NOTHING_MORE, TapRequest, TeacherOutputs
from teacher_cache.teacher.load import Teacher

S = TypeVar("S", bound=Signal)
C = TypeVar("C")
Facts = Any
Trial = Mapping[str, Any] | None
Arrays = Mapping[str, NDArray[np.float32]]
"""Of a calibration, by name."""


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """What calibration read: of `num_tokens` rows, out of `available_tokens` in all sources, the share `held_out_share` is kept for
    measuring what the others are fitted for."""

    teacher: Teacher
    num_tokens: int
    available_tokens: int
    held_out_share: float


@dataclass(frozen=True, slots=True)
class Scale:
    """What is known of a whole cache before the teacher runs: the teacher's config, its tokens, the rows of sampled signals."""

    config: PretrainedConfig
    tokens: int
    vocab_size: int
    needs: Capacities

    def per_token(self, name: str) -> float:
        """Rows of this name, of each token."""
        return self.needs.rows(name) / self.tokens


class SignalExtractor(ABC, Generic[S, C]):
    """How a signal of section `S` is taken from a teacher; `C` is what `extract` works with, made once a cache by `prepare`."""

    document_key: ClassVar[str | None] = None
    """Where the calibration's document keeps the facts; None is under the signal's name in `signals`."""
    trial: ClassVar[Trial] = {}
    """Settings that `doctor --model` tries it with on two lines of text; None where there is nothing to try on."""

    def __init__(self, section: S, context: int) -> None:
        self.section = section
        self.context = context

    @property
    def name(self) -> str:
        """As recipes and paths spell it."""
        return self.section.name()

    # Of the plan alone.

    def planned(self) -> dict[str, Any]:
        """What of the section decides where it is taken, as the plan's document keeps it."""
        return {}

    def capacities(self, unit: UnitPlan) -> dict[str, int]:
        """Rows that this unit needs, by the names that `arrays` asks for them: `<name>_rows`, or `<name>_entries` where an array's
        first axis is `entry`. Arrays of one row per token or per segment need none."""
        return {}

    def attention_places(self, unit: UnitPlan) -> Places:
        """Tokens whose attention rows `extract` reads."""
        return NO_PLACES

    def plan_rows(self, work: UnitWork, manifest: Manifest) -> Rows:
        """All of a unit's rows that need no teacher."""
        return {}

    def refuse_empty(self, needs: Capacities) -> None:
        """InputError where the whole plan gives it nothing to be taken at. `needs`: the most of any unit."""

    # Of the teacher.

    def refuse_beyond(self, config: PretrainedConfig) -> None:
        """InputError where no teacher of this (text) config has what the section asks: here, blocks that it names as `layers`."""
        layers, count = getattr(self.section, "layers", None), getattr(config, "num_hidden_layers", None)
        if isinstance(layers, tuple) and isinstance(count, int) and not all(1 <= layer <= count for layer in layers):
            raise InputError("no such block", expected=f"1 to {count}", found=list(layers), where=f"signals.{self.name}.layers")

    @property
    def needs_head(self) -> bool:
        """Whether it cannot be had without an output head that gives the teacher's own logits."""
        return False

    @property
    def needs_attention(self) -> bool:
        """Whether attention rows are captured for it."""
        return False

    @property
    def one_row_per_token(self) -> bool:
        """Whether `extract` gives a row for each of the batch's tokens: those that are context only are blanked."""
        return False

    def decide(self, teacher: Teacher) -> Facts:
        """The facts that follow from the teacher's build, such as layers; InputError where it has not what the recipe asks."""
        return None

    def taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """What `extract` reads beside final hidden states and logits. `facts`: of `decide` or of `fit`."""
        return NOTHING_MORE

    def refuse_unsupported(self, teacher: Teacher, outputs: TeacherOutputs) -> None:
        """InputError where a first segment, with all taps, shows that the family does not give it."""

    # In calibration.

    def calibration_taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """What `collect` reads beside final hidden states and logits."""
        return NOTHING_MORE

    def calibration_places(self, unit: UnitPlan) -> Places:
        """Tokens whose attention rows `collect` reads."""
        return NO_PLACES

    def collect(self, facts: Facts, batch: SignalBatch) -> Any:
        """What `fit` needs of one segment, on the CPU. Rows that are context only are never stored: they are left out."""
        return None

    def fit(self, facts: Facts, collected: Sequence[Any], sample: CalibrationSample) -> tuple[Facts, Arrays]:
        """The whole facts, and the matrices that the calibration keeps, from what was collected of each segment."""
        return facts, {}

    def document(self, facts: Facts) -> dict[str, Any]:
        """The facts as part of the calibration's document."""
        if self.document_key is not None:
            return {self.document_key: facts}
        return {} if facts is None else {"signals": {self.name: facts}}

    def facts_of(self, document: Mapping[str, Any]) -> Facts:
        """The inverse of `document`, of the manifest's calibration too."""
        return document.get(self.document_key) if self.document_key is not None else document.get("signals", {}).get(self.name)

    def settled(self, document: Mapping[str, Any], vocab_size: int) -> S:
        """The section as the manifest keeps it: with what calibration chose where the recipe leaves it open."""
        return self.section

    # In extraction.

    def prepare(self, facts: Facts, manifest: Manifest, arrays: Arrays, teacher: Teacher) -> C:
        """What `extract` works with, from the facts and the matrices of the calibration; on the teacher's device."""
        found: C = facts
        return found

    @abstractmethod
    def extract(self, prepared: C, batch: SignalBatch) -> Extracted:
        """The rows that a batch adds to its arrays, in the unit's order, and how many codes were saturated."""

    # Before any of it.

    def bytes_per_token(self, scale: Scale) -> tuple[float, float]:
        """The least and the most bytes that it may take of a token. Where this is not overridden: a fifth and eleven tenths of the
        raw bytes of its arrays, as they are where calibration finds nothing."""
        dimensions = Dimensions(
            unit_tokens=1,
            vocab_size=scale.vocab_size,
            hidden_size=scale.config.hidden_size,
            capacities=scale.needs,
            calibration={},
        )
        specs = self.section.arrays(dimensions)
        raw = sum(row_bytes(spec) * rows_of(spec, scale.needs, scale.tokens) for spec in specs) / scale.tokens
        return 0.2 * raw, 1.1 * raw

    def calibration_flops(self, width: int, vocab_size: int, tokens: int, held_out_share: float) -> float:
        """Of the products of `fit`."""
        return 0.0


class SampledExtractor(SignalExtractor[S, C]):
    """A signal of one row for each of some tokens, the same wherever their segment lies: its section's arrays are those of
    `row_range_arrays` and `position_array`, and some of as many rows (`<name>_rows`)."""

    @abstractmethod
    def positions(self, unit: UnitPlan) -> Places:
        """Ascending places of the tokens."""

    def planned(self) -> dict[str, Any]:
        """All of the section."""
        return {"signals": {self.name: self.section.model_dump(mode="json")}}

    def capacities(self, unit: UnitPlan) -> dict[str, int]:
        """A row a token."""
        return {f"{self.name}_rows": len(self.positions(unit))}

    def plan_rows(self, work: UnitWork, manifest: Manifest) -> Rows:
        """Which rows are whose."""
        return row_ranges(self.name, work, work.once(self.positions), manifest)


def row_ranges(name: str, work: UnitWork, positions: Places, manifest: Manifest) -> Rows:
    """Where each segment's rows of a sampled signal begin, globally, how many there are, and each row's global token index."""
    counts = work.plan.rows_per_segment(positions)
    return {
        f"{name}/segments/row_start": first_row(manifest, f"{name}/rows/position", work.number) + np.cumsum(counts) - counts,
        f"{name}/segments/rows": counts,
        f"{name}/rows/position": positions + work.number * manifest.plan.unit_tokens,
    }


def first_row(manifest: Manifest, path: str, unit: int) -> int:
    """Number of a unit's first row in an array."""
    return unit * next(spec.capacity_rows for spec in manifest.specs if spec.path == path)


def row_bytes(spec: ArraySpec) -> int:
    """Of a row, uncompressed."""
    return int(np.dtype(spec.dtype).itemsize * math.prod(spec.row_shape))


def rows_of(spec: ArraySpec, needs: Capacities, tokens: int) -> int:
    """Rows of an array that hold something, in a whole cache of so many tokens and of sampled rows of `needs`."""
    axis, signal = spec.dimension_names[0], spec.path.split("/")[0]
    if axis == "token":
        return tokens
    return needs.rows({"segment": "segments", "entry": f"{signal}_entries"}.get(axis, f"{signal}_rows"))
