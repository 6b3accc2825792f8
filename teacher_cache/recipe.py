"""The recipe of a cache: which teacher, which texts, which signals. One frozen model a section."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from model_taps.taps import tap_names
from run_kit.recipe_file import LocalPath, ModelName
from signal_store.format.section import Section
from signal_store.manifest import Split, Task
from signal_store.signals import DEFAULT_KEYWORDS, Signals


class TeacherSection(Section):
    """Any causal LM folder or hub name. `tokenizer` defaults to the model's own."""

    model: ModelName
    tokenizer: ModelName | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: what the cache was calibrated in; at first what the checkpoint was trained in where the device computes in it
    natively, else float32."""
    device: str | None = None
    """Where the teacher runs; None takes a GPU if there is one."""
    device_map: str | None = None
    """As in `from_pretrained` (`auto` spreads a large teacher); excludes `device`."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.device is not None and self.device_map is not None:
            raise ValueError("device and device_map exclude each other")
        return self


class DatasetReference(Section):
    """What `datasets.load_dataset` takes."""

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | tuple[str, ...] | None = None
    revision: str | None = None


class TaggerSection(Section):
    """What gives words their roles, for importance weights: jieba for Chinese, a spaCy pipeline's folder, or the source's Pygments
    lexer for code (extra `nlp`)."""

    parser: Literal["jieba", "spacy", "pygments"]
    model: LocalPath | None = None
    """Folder of the spaCy pipeline."""
    semantic_model: LocalPath | None = None
    """Folder of a token-classification checkpoint with BIO labels; None takes semantic roles from the dependencies."""
    keywords: bool = False
    """Connectives and predicates are the keywords of this source's texts, which no lexer reads."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.parser == "spacy") != (self.model is not None):
            raise ValueError("model is the folder of a spaCy pipeline: needed with spacy, not with others")
        if self.semantic_model is not None and self.parser != "spacy":
            raise ValueError("semantic_model goes with spacy")
        if self.keywords and self.parser == "pygments":
            raise ValueError("keywords: true is for prose; a lexer finds those of code")
        return self


def _as_list(value: object) -> object:
    if isinstance(value, list | tuple) and not value:
        raise ValueError("at least one place is needed")
    return [value] if isinstance(value, str | Path) else value


Places = Annotated[tuple[LocalPath, ...], BeforeValidator(_as_list)]
"""One file, folder or pattern of files, or several."""


class Source(Section):
    """One data set: where it lies (exactly one of `folder`, `jsonl`, `parquet`, `dataset`), and which columns are text.

    `jsonl` and `parquet` are a file, a folder, a pattern such as `data/**/*.jsonl.gz`, or a list of these; files may be compressed
    with gzip, zstd, xz or bz2. A folder's and a pattern's files are read in the order of their names, a list in its own.
    Columns: `text`; or `prompt` and `completion` (only the completion counts in the loss); or `messages`, a chat that the
    tokenizer's own template renders (only the assistant's tokens count), with `tools`, where chats call some. Files of a folder are
    one document each.
    """

    name: str = Field(min_length=1)
    split: Split = "train"
    folder: LocalPath | None = None
    pattern: str = "**/*"
    jsonl: Places | None = None
    parquet: Places | None = None
    dataset: DatasetReference | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    tools: str | None = None
    """The column of the schemas of tools that a chat may call."""
    chat_template: str | None = None
    """Which of a tokenizer's several templates; None is `default`, or `tool_use` for chats with tools."""
    special_tokens: Literal["text", "tokens"] = "text"
    """What special tokens are that a text or a turn spells: text like any other, so that nobody ends a text or forges a turn; or
    the tokens, for text that was made with them."""
    long_chats: Literal["system", "refuse"] = "system"
    """What to do with chats longer than the context: put the system turn in front of each window, or refuse them."""
    lexer: str | None = None
    """Name of the Pygments lexer that finds keywords; None guesses from the file's name in a folder, else finds none."""
    tagger: TaggerSection | None = None
    """Stores the roles of this source's words, `tags/roles`."""
    task: Task | None = None
    """What the texts ask for: `qa`, of which the evidence signal takes the prompt's sentences, or `summary`, of which the coverage
    signal takes the prompt's key words (it needs a tagger)."""
    max_documents: int | None = Field(None, ge=1, lt=2**53)
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a row that cannot be read does: it stops the plan, or is left out, counted and listed in the manifest. No part of a
    cache's identity, as what was left out is."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        places = [n for n in ("folder", "jsonl", "parquet", "dataset") if getattr(self, n) is not None]
        if len(places) != 1:
            raise ValueError(f"give exactly one of folder, jsonl, parquet, dataset (given: {', '.join(places) or 'none'})")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together")
        kinds = [n for n in ("text", "prompt", "messages") if getattr(self, n) is not None]
        if len(kinds) > 1:
            raise ValueError(f"give one of text, prompt and completion, messages (given: {', '.join(kinds)})")
        if self.folder is None and self.pattern != "**/*":
            raise ValueError("pattern goes with folder")
        chats = [
            n for n, default in (("tools", None), ("chat_template", None), ("long_chats", "system")) if getattr(self, n) != default
        ]
        if chats and self.messages is None:
            raise ValueError(f"{', '.join(chats)}: for a source with messages")
        if self.folder is not None and kinds:
            raise ValueError("a folder's files are plain text; columns are for tables")
        if self.task is not None and self.prompt is None and self.messages is None:
            raise ValueError(f"task: {self.task} needs prompt and completion, or messages")
        if self.task == "summary" and self.tagger is None:
            raise ValueError("task: summary needs a tagger, which tells the key words")
        return self


LOCAL_PLACES = ("folder", "jsonl", "parquet")
"""Fields of a source that say where it lies on this machine: no part of a cache's identity."""


class CalibrationSection(Section):
    """How much text calibration reads: one budget for all sources, half of it spread evenly over them, half by their sizes, and of
    every source one segment at least. The codecs are fitted on a twelfth of all tokens, but 8 to 16 for each channel of the
    teacher's width, and 2,048 at least; the distribution's is measured on a twenty-fourth, but 4 for each channel or 2,048 at
    least, whichever is less, and 4,096 at most. Of a teacher without a usable head 2,048 are read in all. A plan with less text
    gives all it has."""

    tokens_per_source: int | None = Field(None, ge=64, lt=2**31)
    """Instead, so many of each source, or all it has."""


class CacheRecipe(Section):
    """Everything `teacher-cache build` needs. Paths are relative to the working directory."""

    cache: str
    """A folder, or `s3://bucket/prefix`."""
    base: str | None = None
    """Makes this cache an overlay: it takes text and plan of the cache at this address and holds its own signals only; what
    decides the text (sources, context, overlap, append_eos, unit_tokens) is not given then."""
    teacher: TeacherSection
    sources: tuple[Source, ...] = ()
    context: int = Field(1024, ge=2, le=2**24)
    overlap: int = Field(0, ge=0, le=2**24)
    append_eos: bool = True
    """Close each text document with the tokenizer's end-of-text token (chats are closed by their template)."""
    unit_tokens: int | None = Field(None, ge=64, le=2**26)
    """A power of two; None is max(65,536, 16 × context), rounded up to one."""
    batch_tokens: int = Field(8192, ge=1, le=2**26)
    """Tokens of one forward pass, filler included. Part of the cache's identity."""
    forward: Literal["auto", "packed", "padded", "alone"] = "auto"
    """Several segments a row; one a row; one a forward pass. auto takes the first that a probe at `context` tokens finds right."""
    calibration: CalibrationSection = CalibrationSection.model_validate({})
    signals: Signals = Signals()

    @field_validator("cache", "base", mode="before")
    @classmethod
    def _address(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources share a name: {names}")
        return sources

    @field_validator("signals")
    @classmethod
    def _known_taps(cls, signals: Signals) -> Signals:
        unknown = set(() if signals.hidden is None else signals.hidden.taps) - set(tap_names())
        if unknown:
            raise ValueError(f"hidden.taps: no tap {', '.join(sorted(unknown))}; there are {', '.join(tap_names())}")
        return signals

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.model_fields_set & {"sources", "context", "overlap", "append_eos", "unit_tokens"}
        if self.base is not None and given:
            raise ValueError(f"an overlay takes these from its base: {', '.join(sorted(given))}")
        if self.base is None and not self.sources:
            raise ValueError("sources: at least one is needed")
        if self.base is not None:
            return self
        if self.overlap >= self.context:
            raise ValueError(f"overlap must be below context, found {self.overlap} and {self.context}")
        if self.batch_tokens < self.context:
            raise ValueError(f"batch_tokens must hold one context, found {self.batch_tokens} and {self.context}")
        if self.resolved_unit_tokens < self.context or self.resolved_unit_tokens & (self.resolved_unit_tokens - 1):
            raise ValueError(f"unit_tokens must be a power of two of at least context, found {self.unit_tokens}")
        return self

    @property
    def resolved_unit_tokens(self) -> int:
        """Tokens of a unit."""
        return self.unit_tokens or 2 ** (max(65_536, 16 * self.context) - 1).bit_length()

    @property
    def has_tags(self) -> bool:
        """Whether any source's words get roles."""
        return any(source.tagger is not None for source in self.sources)

    @property
    def keywords(self) -> tuple[str, ...]:
        """What counts as a keyword: the attention signal's, or the default, so that an overlay can add the signal."""
        attention = self.signals.attention
        return attention.keywords if attention is not None else DEFAULT_KEYWORDS
