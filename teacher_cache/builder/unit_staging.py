"""From texts to unit plans that wait in a staging folder: tokens, segments, whole segments to units."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer, tokenizer_digest, vocabulary_size
from run_kit.progress import progress_bar
from signal_store.canonical import sha256
from signal_store.errors import InputError, MismatchError, SignalStoreError
from signal_store.format.capacities import Capacities
from signal_store.format.grid import rounded_capacity
from signal_store.io.objects import Objects
from signal_store.ledger.documents import plan_unit_key
from signal_store.manifest import ChatCounts, SourceIdentity, Split, TaggerIdentity
from teacher_cache.corpus.cutting import BadRow, Cutter, Job
from teacher_cache.corpus.document import Document as Text
from teacher_cache.corpus.processes import Cutting
from teacher_cache.corpus.roles import Tagger, make_tagger, no_words
from teacher_cache.corpus.rows import Row
from teacher_cache.corpus.segments import COUNTS, COUNTS_NOT, PlannedSegment
from teacher_cache.corpus.sources import Skips, SourceReader
from teacher_cache.corpus.template import template_of
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe, Source
from teacher_cache.signals.registry import capacities_of

SPLITS: tuple[Split, ...] = ("train", "validation")
NOTHING = Capacities()
MOST_ROWS, MOST_BYTES = 256, 2**18
"""Rows of one job: about a second of tokenising."""
NO_ROOM = Capacities(segments=1, hidden_rows=1, attention_rows=1, attention_entries=1, replay_rows=1)


@dataclass(slots=True)
class Tally:
    """What was seen of one source so far. `rows` are those to be read, at most `limit` documents of them; after these, rows to skip
    until there were `known_skips`."""

    source: Source
    number: int
    rows: Iterator[Row]
    limit: int | None = None
    known_skips: int = 0
    skips: Skips = field(default_factory=Skips)
    first_document: int = 0
    hash: Any = field(default_factory=hashlib.sha256)
    num_documents: int = 0
    num_empty_documents: int = 0
    num_segments: int = 0
    num_tokens: int = 0
    num_unfit_documents: int = 0
    num_labels: int = 0
    counts: bool = False
    """Whether any of its rows counts in a loss."""
    tagger: TaggerIdentity | None = None
    words: Tagger = no_words
    chats: ChatCounts | None = None
    special_tokens_as_text: int = 0

    @classmethod
    def of(
        cls, reader: SourceReader, number: int, *, after: Sequence[SourceIdentity] = (), until: SourceIdentity | None = None
    ) -> "Tally":
        """Of what a reader has left `after` the documents of earlier plans, all or as many as it was once (`until`)."""
        before = sum(identity.num_documents for identity in after)
        most = reader.source.max_documents
        limits = [] if most is None else [max(0, most - before)]
        limits += [] if until is None else [until.num_documents]
        return cls(
            source=reader.source,
            number=number,
            rows=reader.rows(),
            limit=min(limits, default=None),
            known_skips=0 if until is None else until.num_skipped_rows,
            skips=reader.skips,
            first_document=before,
        )

    @property
    def has_its_documents(self) -> bool:
        """Whether no more documents are wanted."""
        return self.limit is not None and self.num_documents >= self.limit

    @property
    def is_full(self) -> bool:
        """Whether nothing more is wanted."""
        return self.has_its_documents and self.skips.count >= self.known_skips

    def see(self, text: Text) -> None:
        """Count one text."""
        self.num_documents += 1
        self.special_tokens_as_text += len(text.spelled)
        if text.chat is not None:
            self.chats = text.chat.counted(self.chats or ChatCounts())
        self.hash.update(len(text.text).to_bytes(8, "little") + text.text.encode())

    def see_segment(self, segment: PlannedSegment) -> None:
        """Count one segment."""
        self.num_segments += 1
        self.num_tokens += len(segment) - segment.context_only
        self.num_labels += int((segment.loss_mask == COUNTS).sum())
        self.counts = self.counts or bool((segment.loss_mask != COUNTS_NOT).any())

    @property
    def fingerprint(self) -> str:
        """Of all texts."""
        return "sha256:" + str(self.hash.hexdigest())

    def identity(self) -> SourceIdentity:
        """What the manifest says of it."""
        return SourceIdentity(
            name=self.source.name,
            split=self.source.split,
            fingerprint=self.fingerprint,
            num_documents=self.num_documents,
            num_empty_documents=self.num_empty_documents,
            num_segments=self.num_segments,
            num_tokens=self.num_tokens,
            tagger=self.tagger,
            task=self.source.task,
            chats=self.chats,
            special_tokens_as_text=self.special_tokens_as_text,
            num_unfit_documents=self.num_unfit_documents,
            num_skipped_rows=self.skips.count,
            skipped_rows=tuple(self.skips.listed),
        )


@dataclass(frozen=True, slots=True)
class StagedUnits:
    """Units that wait in a staging folder: what the plan says of each, and the room they need."""

    units: list[dict[str, Any]]
    needs: Capacities


def load_recipe_tokenizer(recipe: CacheRecipe) -> PreTrainedTokenizerFast:
    """The tokenizer that the recipe names, or the teacher's own."""
    teacher = recipe.teacher
    return load_tokenizer(
        teacher.tokenizer or teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
    )


def load_plan_tokenizer(recipe: CacheRecipe, expected: str) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer; MismatchError where it is not the one that the cache was planned with."""
    tokenizer = load_recipe_tokenizer(recipe)
    found = tokenizer_digest(tokenizer)
    if found != expected:
        raise MismatchError(
            "the cache was planned with another tokenizer",
            expected=expected,
            found=f"{found} ({recipe.teacher.tokenizer or recipe.teacher.model})",
            where=recipe.cache,
            remedy="Restore the tokenizer, or build into another folder.",
        )
    return tokenizer


def stage_units(
    recipe: CacheRecipe,
    objects: Objects,
    prefix: str,
    tokenizer: PreTrainedTokenizerFast,
    tallies: list[Tally],
    room: Capacities | None,
    processes: int = 1,
) -> StagedUnits:
    """Write the unit plans of all the tallies' texts to `prefix`; no unit needs more than `room` where there is one."""
    units: list[dict[str, Any]] = []
    needs = NO_ROOM
    _prepare(tallies, tokenizer)
    cutter = Cutter(recipe, tokenizer, {tally.source.name: tally.words for tally in tallies})
    vocabulary = vocabulary_size(tokenizer)
    with progress_bar() as progress, Cutting(cutter, processes) as cutting:
        bar = progress.add_task("plan", total=None, unit="tokens")
        for split in SPLITS:
            for unit in _units(recipe, cutting, [t for t in tallies if t.source.split == split], room):
                _refuse_unknown_ids(unit, vocabulary)
                data = unit.to_bytes()
                objects.put(f"{prefix}/{len(units):07d}", data)
                units.append({"digest": sha256(data), "split": split, "segments": len(unit.length), "tokens": unit.num_tokens})
                needs = needs.union(capacities_of(unit, recipe.signals, recipe.context))
                progress.advance(bar, unit.num_tokens)
        for tally in tallies:
            _tell_skips(tally, progress.console)
    return StagedUnits(units, needs)


def publish_units(objects: Objects, prefix: str, units: Sequence[dict[str, Any]], first: int) -> None:
    """Move staged unit plans to their keys, which name their content: another planner moves the same bytes or other keys."""
    for number, unit in enumerate(units):
        objects.publish(f"{prefix}/{number:07d}", plan_unit_key(first + number, unit["digest"]))


def tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """What `save_pretrained` writes, by name. Whether this machine was offline is among what it remembers, no part of a plan."""
    if "local_files_only" in tokenizer.init_kwargs:
        tokenizer.init_kwargs["local_files_only"] = False
    with tempfile.TemporaryDirectory() as folder:
        several = isinstance(tokenizer.chat_template, dict)  # as files of their own they would lie in a folder
        tokenizer.save_pretrained(folder, save_jinja_files=not several)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _prepare(tallies: Sequence[Tally], tokenizer: PreTrainedTokenizerFast) -> None:
    """All that may be missing, for every source before anything is tokenised."""
    for tally in tallies:
        source = tally.source
        if source.messages is not None:
            template_of(tokenizer, source.chat_template, tools=source.tools is not None, where=f"source {source.name}")
        if tally.source.tagger is not None:
            tally.words, tally.tagger = make_tagger(tally.source.tagger)


def _tell_skips(tally: Tally, console: Console) -> None:
    skips, count = tally.skips, tally.skips.count + tally.num_unfit_documents
    if count:
        shown = f", the first {len(skips.lines)} of them" if count > len(skips.lines) else ""
        said = [f"{skips.count:,} rows skipped"] if skips.count else []
        said += [f"{tally.num_unfit_documents:,} texts left out that do not fit"] if tally.num_unfit_documents else []
        lines = [f"source {tally.source.name}: {', '.join(said)}{shown}:", *(f"  {line}" for line in skips.lines)]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _refuse_unknown_ids(unit: UnitPlan, vocabulary: int) -> None:
    largest = int(unit.input_ids.max())
    if largest >= vocabulary:
        raise InputError(
            "the tokenizer gives an id that its vocabulary lacks",
            expected=f"below {vocabulary}",
            found=largest,
            where="tokenizer.json",
        )


def refuse_useless(tallies: Sequence[Tally]) -> None:
    """InputError for a source that nothing can be learned from, or validated on."""
    for tally in tallies:
        where = f"source {tally.source.name}"
        if not tally.num_tokens:
            skipped = f", {tally.skips.count} rows skipped ({tally.skips.lines[0]})" if tally.skips.count else ""
            raise InputError(
                "a source has no text",
                expected="at least one document that is not empty",
                found=f"{tally.num_documents} documents, {tally.num_empty_documents} empty{skipped}",
                where=where,
            )
        if not (tally.num_labels if tally.source.split == "validation" else tally.counts):
            raise InputError(
                "a source has no token to predict",
                expected="texts of two tokens or more, some of which count",
                found=f"{tally.num_tokens} tokens in {tally.num_segments} segments, none with a next token that counts",
                where=where,
            )


def _units(recipe: CacheRecipe, cutting: Cutting, tallies: list[Tally], room: Capacities | None) -> Iterator[UnitPlan]:
    """Units of one split: whole segments, in order, until the next would not fit."""
    pending: list[PlannedSegment] = []
    free, used = recipe.resolved_unit_tokens, NOTHING
    for tally, segment in _segments(cutting, tallies):
        needed = NOTHING if room is None else capacities_of(UnitPlan.of([segment]), recipe.signals, recipe.context)
        if room is not None and not room.holds(needed):
            raise InputError(
                "a new segment has more rows than the cache has room for",
                expected=room.model_dump(),
                found=needed.model_dump(),
                where=f"source {tally.source.name}",
                remedy="Build such documents into a cache of their own.",
            )
        if len(segment) > free or (room is not None and not room.holds(used.plus(needed))):
            yield UnitPlan.of(pending)
            pending, free, used = [], recipe.resolved_unit_tokens, NOTHING
        pending.append(segment)
        free -= len(segment)
        used = used.plus(needed)
    if pending:
        yield UnitPlan.of(pending)


def rounded(capacities: Capacities) -> Capacities:
    """The room that the arrays really have."""
    return Capacities(**{name: rounded_capacity(rows) for name, rows in capacities.model_dump().items()})


def _segments(cutting: Cutting, tallies: Sequence[Tally]) -> Iterator[tuple[Tally, PlannedSegment]]:
    """All segments of some sources, in order, each with the source that it counts for."""
    by_number = {tally.number: tally for tally in tallies}
    for job, outcomes in cutting.outcomes(_jobs(tallies)):
        tally = by_number[job.number]
        for outcome in outcomes:
            if tally.is_full:
                break
            if isinstance(outcome, BadRow):
                _skip(tally, outcome)
                if outcome.text is None:
                    continue
            if tally.has_its_documents:  # where rows to skip were expected: the text is another, as its digest will show
                tally.known_skips = 0
                break
            assert outcome.text is not None
            tally.see(outcome.text)
            if isinstance(outcome, BadRow):  # it counts as a document, for it is one whenever the source is read again
                tally.num_unfit_documents += 1
                continue
            tally.num_empty_documents += outcome.is_empty
            for segment in outcome.segments:
                tally.see_segment(segment)
                yield tally, replace(segment, document=tally.first_document + tally.num_documents - 1)
        if job.failure is not None and not tally.is_full:
            raise job.failure


def _skip(tally: Tally, row: BadRow) -> None:
    if tally.source.on_bad_row == "stop":
        raise row.error
    if row.text is None:
        tally.skips.add(row.number, row.error)
    else:
        tally.skips.tell(row.number, row.error)


def _jobs(tallies: Sequence[Tally]) -> Iterator[Job]:
    """Rows of some sources in handy numbers. What stops the reading comes with the rows before it."""
    for tally in tallies:
        failure = None
        while not tally.is_full and failure is None:
            left = MOST_ROWS if tally.limit is None else max(1, tally.limit - tally.num_documents)
            taken, failure = _taken(tally.rows, min(left, MOST_ROWS))
            if not taken and failure is None:
                break
            yield Job(tally.source, tally.number, taken, failure)


def _taken(rows: Iterator[Row], most: int) -> tuple[list[Row], SignalStoreError | None]:
    taken: list[Row] = []
    size = 0
    try:
        while len(taken) < most and size < MOST_BYTES and (row := next(rows, None)) is not None:
            taken.append(row)
            size += row.size
    except SignalStoreError as error:
        return taken, error
    return taken, None
