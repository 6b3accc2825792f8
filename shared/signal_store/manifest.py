"""The identity of a cache. Its digest is the cache id, carried by every record; times, paths, hosts and versions are not in it."""

from functools import cached_property
from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from signal_store.arrays import ArraySpec
from signal_store.canonical import digest
from signal_store.errors import CorruptError, MismatchError
from signal_store.signals import Section, Signals, Tap, without_empty

FORMAT_VERSION = 1
Split = Literal["train", "validation"]
Task = Literal["qa", "summary"]


class TeacherIdentity(Section):
    """Which model spoke, and how it was run. `name` is what the recipe calls it; the digests are what counts."""

    name: str
    revision: str | None
    model_type: str
    config_digest: str
    weights_digest: str
    dtype: str
    attn_implementation: str
    hidden_size: int
    num_layers: int
    num_heads: int | None
    """None of a model without attention."""
    max_positions: int | None
    logit_softcap: float | None
    """Soft-capping that a reader must apply to the reconstructed tail."""


class TokenizerIdentity(Section):
    """Which token ids mean what: the digest covers vocabulary, merges, pre-tokenizer and added tokens, not the chat template."""

    digest: str
    vocab_size: int
    """Rows of the distribution; a model's padded rows beyond it are not part of the vocabulary."""


class TaggerIdentity(Section):
    """What gave a source's words their roles: the parser and its version, the digests of the pipeline's and of the semantic-role
    model's files, where there are such."""

    parser: Literal["jieba", "spacy", "pygments"]
    version: str
    digest: str | None
    semantic_digest: str | None


class SourceIdentity(Section):
    """One source: its name, its side, what was read and what was left out, and a digest of all its texts."""

    name: str
    split: Split
    fingerprint: str
    num_documents: int
    num_empty_documents: int
    num_segments: int
    num_tokens: int
    tagger: TaggerIdentity | None = None
    task: Task | None = None

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A source without a tagger or task is what it was before there were any: its digest too."""
        return without_empty(handler(self), "tagger", "task")


class Capacities(Section):
    """Rows that every unit has room for, in the arrays that do not have one row per token: maxima over the plan's units."""

    segments: int
    hidden_rows: int
    attention_rows: int
    attention_entries: int
    replay_rows: int
    evidence_rows: int = 0
    coverage_rows: int = 0

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "evidence_rows", "coverage_rows")

    def union(self, other: "Capacities") -> "Capacities":
        """Room for both."""
        return Capacities(**{name: max(getattr(self, name), getattr(other, name)) for name in Capacities.model_fields})

    def plus(self, other: "Capacities") -> "Capacities":
        """Rows of both, one after the other."""
        return Capacities(**{name: getattr(self, name) + getattr(other, name) for name in Capacities.model_fields})

    def holds(self, other: "Capacities") -> bool:
        """Whether the other fits."""
        return self.union(other) == self


class PlanIdentity(Section):
    """How the text was cut, and how segments are batched for the teacher."""

    digest: str
    text_digest: str
    """Of the tokens, segments and keyword positions alone: caches that share it can be opened as one."""
    overlay: bool
    """Tokens and segments are in another cache of the same text digest, not in this one."""
    context: int
    overlap: int
    unit_tokens: int
    batch_tokens: int
    forward: Literal["packed", "padded", "alone"]
    split_length: int | None = None
    """Segments of up to so many tokens and longer ones are in no forward pass together; None: all may be."""
    capacities: Capacities


class HiddenLayout(Section):
    """What is stored of one tap of one layer: `rank` directions of `width`, which keep `explained_variance` of it."""

    tap: Tap
    layer: int
    width: int
    rank: int | None
    explained_variance: float

    @property
    def group(self) -> str:
        """Its group in the hierarchy."""
        return f"hidden/{self.tap}/{self.layer}"


class AttentionLayout(Section):
    """Which heads are stored of one layer."""

    layer: int
    head_ids: tuple[int, ...]
    max_columns: int | None

    @property
    def group(self) -> str:
        """Its group in the hierarchy."""
        return f"attention/{self.layer}"


class StatsLayout(Section):
    """Which layers statistics are taken of; of the attention, those with softmax attention and their heads."""

    layers: tuple[int, ...]
    attention_layers: tuple[int, ...]
    num_heads: int


class CalibrationIdentity(Section):
    """What calibration decided, and the digest of the matrices it made."""

    digest: str
    tail_rank: int
    coverage: tuple[float, ...]
    """Mean mass of the head at each cached temperature: what a reader is served where there is no tail."""
    hidden: tuple[HiddenLayout, ...]
    attention: tuple[AttentionLayout, ...]
    stats: StatsLayout | None
    replay_layers: tuple[int, ...]
    evidence_layers: tuple[int, ...] = ()

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "evidence_layers")


class Manifest(Section):
    """Everything two caches must share to be the same cache."""

    format_version: int
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    sources: tuple[SourceIdentity, ...]
    plan: PlanIdentity
    calibration: CalibrationIdentity
    signals: Signals
    arrays: tuple[dict[str, Any], ...]

    @cached_property
    def cache_id(self) -> str:
        """Digest of the canonical JSON of this manifest."""
        return digest(self.model_dump(mode="json"))

    @cached_property
    def specs(self) -> tuple[ArraySpec, ...]:
        """The arrays that units fill."""
        return tuple(ArraySpec.from_json(dict(array)) for array in self.arrays)


def parse_manifest(body: dict[str, Any], where: str) -> Manifest:
    """The manifest in a ledger document; refuses a format this version does not know."""
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise MismatchError(
            "another format version", expected=FORMAT_VERSION, found=version, where=where, remedy="Install a version that reads it."
        )
    try:
        return Manifest.model_validate(body)
    except ValueError as error:
        raise CorruptError("the manifest does not parse", found=" ".join(str(error).split())[:300], where=where) from error
