"""From texts to unit plans that wait in a staging folder: tokens, segments, whole segments to units."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer, tokenizer_digest
from signal_store.canonical import sha256
from signal_store.errors import InputError, MismatchError
from signal_store.layout import rounded_capacity
from signal_store.ledger import plan_unit_key
from signal_store.manifest import Capacities, SourceIdentity, Split, TaggerIdentity
from signal_store.objects import Objects
from signal_store.progress import progress_bar
from teacher_cache.corpus.document import Document as Text
from teacher_cache.corpus.roles import Tagger, make_tagger, no_words, token_roles
from teacher_cache.corpus.segments import PlannedSegment, cut
from teacher_cache.corpus.tokens import tokenize
from teacher_cache.positions import capacities_of
from teacher_cache.recipe import CacheRecipe, Source
from teacher_cache.unit_plan import UnitPlan

SPLITS: tuple[Split, ...] = ("train", "validation")
NOTHING = Capacities(segments=0, hidden_rows=0, attention_rows=0, attention_entries=0, replay_rows=0)
NO_ROOM = Capacities(segments=1, hidden_rows=1, attention_rows=1, attention_entries=1, replay_rows=1)


@dataclass(slots=True)
class Tally:
    """What was seen of one source so far."""

    source: Source
    number: int
    texts: Iterator[Text]
    first_document: int = 0
    hash: Any = field(default_factory=hashlib.sha256)
    num_documents: int = 0
    num_empty_documents: int = 0
    num_segments: int = 0
    num_tokens: int = 0
    tagger: TaggerIdentity | None = None
    words: Tagger = no_words

    def see(self, text: Text) -> None:
        """Count one text."""
        self.num_documents += 1
        self.hash.update(len(text.text).to_bytes(8, "little") + text.text.encode())

    def identity(self) -> SourceIdentity:
        """What the manifest says of it."""
        return SourceIdentity(
            name=self.source.name,
            split=self.source.split,
            fingerprint="sha256:" + self.hash.hexdigest(),
            num_documents=self.num_documents,
            num_empty_documents=self.num_empty_documents,
            num_segments=self.num_segments,
            num_tokens=self.num_tokens,
            tagger=self.tagger,
            task=self.source.task,
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
) -> StagedUnits:
    """Write the unit plans of all the tallies' texts to `prefix`; no unit needs more than `room` where there is one."""
    units: list[dict[str, Any]] = []
    needs = NO_ROOM
    for tally in tallies:  # all of them before anything is tokenised: one may be missing
        if tally.source.tagger is not None:
            tally.words, tally.tagger = make_tagger(tally.source.tagger)
    max_columns = recipe.resolved_max_columns
    with progress_bar() as progress:
        bar = progress.add_task("plan", total=None, unit="tokens")
        for split in SPLITS:
            for unit in _units(recipe, tokenizer, [t for t in tallies if t.source.split == split], room):
                data = unit.to_bytes()
                objects.put(f"{prefix}/{len(units):07d}", data)
                units.append({"digest": sha256(data), "split": split, "segments": len(unit.length), "tokens": unit.num_tokens})
                needs = needs.union(capacities_of(unit, recipe.signals, max_columns))
                progress.advance(bar, unit.num_tokens)
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
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _units(
    recipe: CacheRecipe, tokenizer: PreTrainedTokenizerFast, tallies: list[Tally], room: Capacities | None
) -> Iterator[UnitPlan]:
    """Units of one split: whole segments, in order, until the next would not fit."""
    pending: list[PlannedSegment] = []
    free, used = recipe.resolved_unit_tokens, NOTHING
    for tally in tallies:
        for segment in _segments(recipe, tokenizer, tally):
            needed = NOTHING if room is None else capacities_of(UnitPlan.of([segment]), recipe.signals, recipe.resolved_max_columns)
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


def _segments(recipe: CacheRecipe, tokenizer: PreTrainedTokenizerFast, tally: Tally) -> Iterator[PlannedSegment]:
    keywords = frozenset(recipe.keywords)
    numbers: list[int] = []

    def read() -> Iterator[Text]:
        for text in tally.texts:
            tally.see(text)
            if text.text:
                numbers.append(tally.first_document + tally.num_documents - 1)
                yield text
            else:
                tally.num_empty_documents += 1

    roles_of = partial(token_roles, tally.words) if recipe.has_tags else None
    tokenized = tokenize(read(), tokenizer, append_eos=recipe.append_eos, keywords=keywords, roles_of=roles_of)
    for index, document in enumerate(tokenized):
        tally.num_empty_documents += not len(document.input_ids)  # a normaliser may leave nothing
        for segment in cut(document, recipe.context, recipe.overlap, tally.number, numbers[index]):
            tally.num_segments += 1
            tally.num_tokens += len(segment) - segment.context_only
            yield segment
