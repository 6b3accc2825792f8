"""plan: texts to tokens, segments and units. A pure function of recipe and data; the first to commit wins.

An overlay stands on another cache's plan: same units, same tokens, its own signals. An extension appends units for new documents.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_config, load_tokenizer, tokenizer_digest
from signal_store.canonical import digest, sha256
from signal_store.errors import InputError, MismatchError, NotFoundError
from signal_store.layout import rounded_capacity
from signal_store.ledger import (
    PLAN,
    Document,
    attempt_folder,
    commit,
    extension_key,
    find_document,
    plan_unit_key,
    read_document,
    tokenizer_key,
)
from signal_store.manifest import Capacities, SourceIdentity, Split
from signal_store.objects import Objects, objects_at
from signal_store.progress import progress_bar
from signal_store.signals import DEFAULT_KEYWORDS
from teacher_cache.corpus.document import Document as Text
from teacher_cache.corpus.segments import PlannedSegment, cut
from teacher_cache.corpus.sources import documents
from teacher_cache.corpus.tokens import tokenize
from teacher_cache.positions import capacities_of
from teacher_cache.recipe import CacheRecipe, Source
from teacher_cache.unit_plan import UnitPlan
from teacher_cache.workers import ALONE, Worker

SPLITS: tuple[Split, ...] = ("train", "validation")
NO_ROOM = Capacities(segments=1, hidden_rows=1, attention_rows=1, attention_entries=1, replay_rows=1)


@dataclass(frozen=True, slots=True)
class Plan:
    """A committed plan and its extensions, oldest first."""

    document: Document
    extensions: tuple[Document, ...] = ()

    @property
    def digest(self) -> str:
        """Identity of the plan; extensions do not change it."""
        return self.document.digest

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer: rows of the distribution."""
        return int(self.document.body["tokenizer"]["vocab_size"])

    @property
    def text_digest(self) -> str:
        """Identity of its tokens and segments alone: overlays share it."""
        recipe = self.document.body["recipe"]
        units = [unit["digest"] for unit in self.document.body["units"]]
        parts = {"tokenizer": self.document.body["tokenizer"]["digest"], "unit_tokens": recipe["unit_tokens"], "units": units}
        return digest(parts)

    @property
    def units(self) -> list[dict[str, Any]]:
        """Of all generations: digest, split, segments, tokens."""
        return [unit for document in (self.document, *self.extensions) for unit in document.body["units"]]

    @property
    def num_units(self) -> int:
        """How many units there are to fill."""
        return len(self.units)

    @property
    def sources(self) -> tuple[SourceIdentity, ...]:
        """What was read, in all generations."""
        found = [source for document in (self.document, *self.extensions) for source in document.body["sources"]]
        return tuple(SourceIdentity.model_validate(s) for s in found)

    @property
    def capacities(self) -> Capacities:
        """Rows each unit has room for."""
        return Capacities.model_validate(self.document.body["capacities"])

    def at_generation(self, extensions: int) -> "Plan":
        """The plan as it was when it had this many extensions."""
        return Plan(self.document, self.extensions[:extensions])

    @property
    def recipe(self) -> dict[str, Any]:
        """The part of the recipe that decided it (`planned_part`)."""
        part: dict[str, Any] = self.document.body["recipe"]
        return part

    def unit(self, objects: Objects, unit: int) -> UnitPlan:
        """The plan of one unit."""
        content = self.units[unit]["digest"]
        key = plan_unit_key(unit, content)
        return UnitPlan.from_bytes(objects.read(key), content, key)


def plan(recipe: CacheRecipe, worker: Worker = ALONE) -> Plan:
    """Make the plan, or take the one that stands; MismatchError if that was made by another recipe."""
    recipe = settled(recipe)
    objects = objects_at(recipe.cache)
    if worker.should_make(objects, "plan", PLAN):
        try:
            _make_overlay(recipe, objects) if recipe.base is not None else _make(recipe, objects)
        except NotFoundError:
            if not objects.exists(PLAN):  # another planner was first, and a seal swept what this one had staged
                raise
    planned = read_plan(objects)
    changed_sources = "sources" if planned.extensions else None
    refuse_another_recipe("planned", planned.recipe, planned_part(recipe), recipe, ignore=changed_sources)
    return planned


def read_plan(objects: Objects) -> Plan:
    """The plan that stands, with all its extensions; NotFoundError if there is none."""
    document = read_document(objects, PLAN)
    extensions: list[Document] = []
    while (found := find_document(objects, extension_key(len(extensions) + 1))) is not None:
        extensions.append(found)
    return Plan(document, tuple(extensions))


def settled(recipe: CacheRecipe) -> CacheRecipe:
    """The recipe; an overlay's with what it takes from its base."""
    if recipe.base is None:
        return recipe
    base = read_plan(objects_at(recipe.base)).recipe
    if recipe.batch_tokens < base["context"]:
        raise InputError("batch_tokens must hold one context", expected=f"at least {base['context']}", found=recipe.batch_tokens)
    return recipe.model_copy(update={name: base[name] for name in ("context", "overlap", "append_eos", "unit_tokens")})


def planned_part(recipe: CacheRecipe) -> dict[str, Any]:
    """What of the recipe decides the plan, as JSON: the text, and where each signal is taken."""
    signals = recipe.signals
    positions = {
        "max_columns": recipe.resolved_max_columns,
        "previous_steps": signals.attention.previous_steps if signals.attention else 0,
        "hidden_positions": signals.hidden.model_dump(mode="json")["positions"] if signals.hidden else None,
        "replay_positions": [signals.replay.positions_per_segment, signals.replay.seed] if signals.replay else None,
    }
    if recipe.base is not None:
        return {"keywords": list(signals.attention.keywords), **positions} if signals.attention else positions
    part = recipe.model_dump(mode="json", include={"sources", "context", "overlap", "append_eos"})
    keywords = list(signals.attention.keywords if signals.attention else DEFAULT_KEYWORDS)
    return {**part, "unit_tokens": recipe.resolved_unit_tokens, "keywords": keywords, **positions}


def refuse_another_recipe(
    done: str, made: dict[str, Any], wanted: dict[str, Any], recipe: CacheRecipe, ignore: str | None = None
) -> None:
    """MismatchError naming the parts of the recipe that differ from what the cache was `done` (planned, calibrated) by."""
    names = wanted.keys() if recipe.base is not None else made.keys() | wanted.keys()
    changed = sorted(key for key in names if key != ignore and made.get(key) != wanted.get(key))
    if changed:
        raise MismatchError(
            f"the cache was {done} by another recipe ({', '.join(changed)} differ)",
            expected={key: made.get(key) for key in changed},
            found={key: wanted.get(key) for key in changed},
            where=recipe.cache,
            remedy="Restore the recipe, or build into another folder; `teacher-cache extend` adds documents.",
        )


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


def _make(recipe: CacheRecipe, objects: Objects) -> None:
    tokenizer = load_recipe_tokenizer(recipe)
    _check_context(recipe)
    tallies = [Tally(source, number, documents(source, tokenizer)) for number, source in enumerate(recipe.sources)]
    with attempt_folder(objects, "plan") as (attempt, prefix):
        staged = stage_units(recipe, objects, prefix, tokenizer, tallies, room=None)
        for tally in tallies:
            if not tally.num_tokens:
                raise InputError(
                    "a source has no text",
                    expected="at least one document that is not empty",
                    found=f"{tally.num_documents} documents, {tally.num_empty_documents} empty",
                    where=f"source {tally.source.name}",
                )
        _refuse_without_keywords(recipe, staged.needs)
        files = _tokenizer_files(tokenizer)
        body = {
            "recipe": planned_part(recipe),
            "base": None,
            "tokenizer": {
                "digest": tokenizer_digest(tokenizer),
                "vocab_size": len(tokenizer),
                "files": {name: sha256(data) for name, data in files.items()},
            },
            "sources": [tally.identity().model_dump(mode="json") for tally in tallies],
            "capacities": staged.needs.model_dump(mode="json"),
            "units": staged.units,
        }
        for name, data in files.items():
            objects.put(f"{prefix}/tokenizer/{name}", data)
            objects.publish(f"{prefix}/tokenizer/{name}", tokenizer_key(name))
        publish_units(objects, prefix, staged.units, first=0)
        document, _ = commit(objects, PLAN, body, attempt)
    objects.delete_tree(prefix)
    if document.digest != digest(body):
        raise MismatchError("another worker planned other text", expected=digest(body), found=document.digest, where=PLAN)


def _make_overlay(recipe: CacheRecipe, objects: Objects) -> None:
    """Copy the base's plan; only the room for its own signals is this cache's."""
    assert recipe.base is not None
    below = objects_at(recipe.base)
    base = read_plan(below)
    if base.extensions:
        raise InputError(
            "an overlay stands on a cache that was not extended", found=f"{len(base.extensions)} extensions", where=recipe.base
        )
    attention = recipe.signals.attention
    if attention is not None and list(attention.keywords) != base.recipe["keywords"]:
        raise MismatchError(
            "an overlay has its base's keywords",
            expected=base.recipe["keywords"],
            found=list(attention.keywords),
            where="signals.attention",
        )
    needs = NO_ROOM
    max_columns = recipe.resolved_max_columns
    with attempt_folder(objects, "plan") as (attempt, _), progress_bar() as progress:
        bar = progress.add_task("plan", total=base.num_units, unit="units")
        for number, unit in enumerate(base.units):
            data = below.read(plan_unit_key(number, unit["digest"]))
            needs = needs.union(capacities_of(UnitPlan.from_bytes(data, unit["digest"], recipe.base), recipe.signals, max_columns))
            objects.put(plan_unit_key(number, unit["digest"]), data)
            progress.advance(bar)
        _refuse_without_keywords(recipe, needs)
        for name in base.document.body["tokenizer"]["files"]:
            objects.put(tokenizer_key(name), below.read(tokenizer_key(name)))
        body = {
            **base.document.body,
            "recipe": {**base.recipe, **planned_part(recipe)},
            "base": base.digest,
            "capacities": needs.model_dump(mode="json"),
        }
        commit(objects, PLAN, body, attempt)


def _refuse_without_keywords(recipe: CacheRecipe, needs: Capacities) -> None:
    if recipe.signals.attention is not None and needs.attention_entries <= 1:
        raise InputError(
            "no keyword was found for the attention signal",
            expected="a source with a lexer, and its keywords in the text",
            found="none",
            remedy="Give sources a lexer, or leave signals.attention out.",
        )


def restore_plan(recipe: CacheRecipe, objects: Objects) -> None:
    """Make the plan again from the recipe's texts where it, a unit's plan or a tokenizer file is gone or altered.

    MismatchError if the texts are not what they were.
    """
    recipe = settled(recipe)
    if not objects.exists(PLAN):
        _make_overlay(recipe, objects) if recipe.base is not None else _make(recipe, objects)
    planned = read_plan(objects)
    files = planned.document.body["tokenizer"]["files"]
    wanted = {tokenizer_key(name): content for name, content in files.items()}
    wanted |= {plan_unit_key(number, unit["digest"]): unit["digest"] for number, unit in enumerate(planned.units)}
    broken = [key for key, content in wanted.items() if not objects.exists(key) or sha256(objects.read(key)) != content]
    if not broken:
        return
    if recipe.base is not None:
        below = objects_at(recipe.base)
        for key in broken:
            objects.put(key, below.read(key))
        return
    tokenizer = load_recipe_tokenizer(recipe)
    for name, data in _tokenizer_files(tokenizer).items():
        if tokenizer_key(name) in broken:
            objects.put(tokenizer_key(name), data)
    room = None
    first = 0
    with attempt_folder(objects, "plan") as (_, prefix):
        for generation, tallies in enumerate(generation_tallies(recipe, planned, tokenizer)):
            staged = stage_units(recipe, objects, f"{prefix}/{generation}", tokenizer, tallies, room)
            for number, unit in enumerate(staged.units):
                key = plan_unit_key(first + number, unit["digest"])
                if key in broken:
                    objects.put(key, objects.read(f"{prefix}/{generation}/{number:07d}"))
            first += len(staged.units)
            room = rounded(planned.capacities)
    objects.delete_tree(prefix)
    left = [key for key in broken if not objects.exists(key) or sha256(objects.read(key)) != wanted[key]]
    if left:
        raise MismatchError(
            "the texts are not what they were when the cache was planned",
            expected=f"the same documents for {len(broken)} damaged objects",
            found="others",
            where=left[0],
            remedy="Restore the sources, or build into another folder.",
        )


def generation_tallies(recipe: CacheRecipe, planned: Plan, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Tally]]:
    """By generation, the sources that it added, each reading exactly its own documents."""
    texts = {source.name: documents(source, tokenizer) for source in recipe.sources}
    by_name = {source.name: source for source in recipe.sources}
    seen = dict.fromkeys(by_name, 0)
    number = 0
    for document in (planned.document, *planned.extensions):
        tallies = []
        for identity in (SourceIdentity.model_validate(s) for s in document.body["sources"]):
            if identity.name not in by_name:
                raise MismatchError("the recipe lacks a source of the cache", expected=identity.name, found=", ".join(by_name))
            own = islice(texts[identity.name], identity.num_documents)
            tallies.append(Tally(by_name[identity.name], number, own, first_document=seen[identity.name]))
            seen[identity.name] += identity.num_documents
            number += 1
        yield tallies


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


def _tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _check_context(recipe: CacheRecipe) -> None:
    config = load_config(
        recipe.teacher.model, what="teacher", revision=recipe.teacher.revision, trust_remote_code=recipe.teacher.trust_remote_code
    ).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.context > longest:
        raise InputError(
            "the context is longer than the teacher's",
            expected=f"at most {longest}",
            found=recipe.context,
            where="context",
            remedy="Lower context.",
        )


def _units(
    recipe: CacheRecipe, tokenizer: PreTrainedTokenizerFast, tallies: list[Tally], room: Capacities | None
) -> Iterator[UnitPlan]:
    """Units of one split: whole segments, in order, until the next would not fit."""
    pending: list[PlannedSegment] = []
    free = recipe.resolved_unit_tokens
    for tally in tallies:
        for segment in _segments(recipe, tokenizer, tally):
            if len(segment) > free or (pending and room is not None and not _fits([*pending, segment], recipe, room)):
                yield UnitPlan.of(pending)
                pending, free = [], recipe.resolved_unit_tokens
            if room is not None and not _fits([segment], recipe, room):
                raise InputError(
                    "a new segment has more rows than the cache has room for",
                    expected=room.model_dump(),
                    found=capacities_of(UnitPlan.of([segment]), recipe.signals, recipe.resolved_max_columns).model_dump(),
                    where=f"source {tally.source.name}",
                    remedy="Build such documents into a cache of their own.",
                )
            pending.append(segment)
            free -= len(segment)
    if pending:
        yield UnitPlan.of(pending)


def _fits(segments: list[PlannedSegment], recipe: CacheRecipe, room: Capacities) -> bool:
    return room.holds(capacities_of(UnitPlan.of(segments), recipe.signals, recipe.resolved_max_columns))


def rounded(capacities: Capacities) -> Capacities:
    """The room that the arrays really have."""
    return Capacities(**{name: rounded_capacity(rows) for name, rows in capacities.model_dump().items()})


def _segments(recipe: CacheRecipe, tokenizer: PreTrainedTokenizerFast, tally: Tally) -> Iterator[PlannedSegment]:
    keywords = frozenset(planned_part(recipe)["keywords"])
    numbers: list[int] = []

    def read() -> Iterator[Text]:
        for text in tally.texts:
            tally.see(text)
            if text.text:
                numbers.append(tally.first_document + tally.num_documents - 1)
                yield text
            else:
                tally.num_empty_documents += 1

    tokenized = tokenize(read(), tokenizer, append_eos=recipe.append_eos, keywords=keywords)
    for index, document in enumerate(tokenized):
        tally.num_empty_documents += not len(document.input_ids)  # a normaliser may leave nothing
        for segment in cut(document, recipe.context, recipe.overlap, tally.number, numbers[index]):
            tally.num_segments += 1
            tally.num_tokens += len(segment) - segment.context_only
            yield segment
