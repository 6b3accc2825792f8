"""The identity of a cache. The digest of the document as it was stored is the cache id, carried by every record; times, paths,
hosts and versions are not in it.

Policy: the id is never computed from a manifest that was parsed and written again. A field that a later version adds takes its
default where a stored document lacks it, so its default must mean what was done before there was the field.
"""

from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, ValidationError, model_serializer

from signal_store.canonical import digest
from signal_store.errors import CorruptError, MismatchError
from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.format.section import Section
from signal_store.signals import AttentionLayout, HiddenLayout, Signals, StatsLayout

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


class ChatCounts(Section):
    """How a source's chats were rendered: `kept_whole`, all answers in one text; `split`, one text for each answer, where the
    template changes earlier turns. Of the `answers` in all, `unseen_reasoning` had reasoning that the template does not show."""

    kept_whole: int = 0
    split: int = 0
    answers: int = 0
    unseen_reasoning: int = 0


class SkippedRow(Section):
    """A row that was left out: its number in its source, from 1, and why."""

    row: int
    reason: str


class SourceIdentity(Section):
    """One source: its name, its side, what was read and what was left out, and a digest of all its texts. Of the rows that were
    skipped (`on_bad_row: skip`), the first are listed."""

    name: str
    split: Split
    fingerprint: str
    num_documents: int
    num_empty_documents: int
    num_segments: int
    num_tokens: int
    tagger: TaggerIdentity | None = None
    task: Task | None = None
    chats: ChatCounts | None = None
    special_tokens_as_text: int = 0
    """Special tokens that its texts spell, and that were read as text."""
    num_unfit_documents: int = 0
    """Documents that were left out because they do not fit the context; listed with the skipped rows, and counted here alone."""
    num_skipped_rows: int = 0
    skipped_rows: tuple[SkippedRow, ...] = ()


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
    signals: dict[str, Any] = Field(default_factory=dict)
    """By name, what was decided of signals that have no field here; left out where there is none."""

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        if not self.signals:
            del found["signals"]
        return found


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

    _stored: dict[str, Any] | None = PrivateAttr(None)

    @classmethod
    def stored(cls, body: dict[str, Any]) -> Self:
        """The manifest that a ledger document holds; ValidationError if it is none."""
        manifest = cls.model_validate(body)
        manifest._stored = body  # noqa: SLF001  (its own class)
        return manifest

    @property
    def body(self) -> dict[str, Any]:
        """What the ledger's document holds: as it was stored, or, of a new manifest, as it will be."""
        return self.model_dump(mode="json") if self._stored is None else self._stored

    @cached_property
    def cache_id(self) -> str:
        """Digest of the canonical JSON of `body`."""
        return digest(self.body)

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
        return Manifest.stored(body)
    except ValidationError as error:
        problems = error.errors()
        unknown = [".".join(map(str, p["loc"])) for p in problems if p["type"] == "extra_forbidden"]
        if len(unknown) == len(problems):
            raise MismatchError(
                "the cache was made by a later version",
                expected="keys that this version knows",
                found=", ".join(unknown[:5]),
                where=where,
                remedy="Install the version of teacher-cache that made it, or a later one.",
            ) from error
        raise CorruptError("the manifest does not parse", found=" ".join(str(error).split())[:300], where=where) from error
