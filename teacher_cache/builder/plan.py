"""plan: texts to tokens, segments and units. A pure function of recipe and data; the first to commit wins.

An overlay stands on another cache's plan: same units, same tokens, its own signals. An extension appends units for new documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import tokenizer_digest, vocabulary_size
from run_kit.progress import progress_bar
from signal_store.canonical import digest, sha256
from signal_store.errors import InputError, MismatchError, NotFoundError
from signal_store.format.capacities import Capacities
from signal_store.io.commit_check import refuse_uncommittable
from signal_store.io.local import LocalObjects
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import (
    MANIFEST,
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
from signal_store.manifest import SourceIdentity, parse_manifest
from teacher_cache.builder.recipe_parts import completed_plan, planned_part, refuse_another_recipe
from teacher_cache.builder.unit_staging import (
    NO_ROOM,
    Tally,
    load_recipe_tokenizer,
    publish_units,
    refuse_useless,
    stage_units,
    tokenizer_files,
)
from teacher_cache.builder.workers import ALONE, Worker
from teacher_cache.corpus.sources import SourceReader
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import LOCAL_PLACES, CacheRecipe, Source
from teacher_cache.signals.limits import refuse_beyond_teacher
from teacher_cache.signals.registry import capacities_of, refuse_empty_signals


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
    def has_tags(self) -> bool:
        """Whether the units hold the roles of words; an overlay's are its base's."""
        first = [SourceIdentity.model_validate(source) for source in self.document.body["sources"]]
        return self.document.body["base"] is None and any(source.tagger is not None for source in first)

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

    def spread_units(self, limit: int) -> list[int]:
        """At most `limit` units, spread evenly."""
        return sorted({round(i * (self.num_units - 1) / max(1, limit - 1)) for i in range(limit)})

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
            make_plan(recipe, objects, worker.processes)
        except NotFoundError:
            if not objects.exists(PLAN):  # another planner was first, and a seal swept what this one had staged
                raise
    planned = read_plan(objects)
    changed_sources = "sources" if planned.extensions else None
    refuse_another_recipe("planned", completed_plan(planned.recipe), planned_part(recipe), recipe, ignore=changed_sources)
    _refuse_moved_text(recipe, planned)
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


def places_of(recipe: CacheRecipe) -> dict[str, str]:
    """By source, where it lies on this machine, if it does."""
    places = {source.name: [getattr(source, name) for name in LOCAL_PLACES] for source in recipe.sources}
    return {name: _place(next(p for p in found if p is not None)) for name, found in places.items() if any(found)}


def _place(found: Path | Sequence[Path]) -> str:
    return str(found) if isinstance(found, Path) else ", ".join(map(str, found))


def _refuse_moved_text(recipe: CacheRecipe, planned: Plan) -> None:
    """Read a source again that lies elsewhere than when it was planned; MismatchError if its text is another."""
    then = planned.document.about.get("places", {})
    moved = {name for name, place in places_of(recipe).items() if name in then and then[name] != place}
    if moved:
        tokenizer = load_recipe_tokenizer(recipe)
        for source in recipe.sources:
            if source.name in moved:
                old = [identity for identity in planned.document.body["sources"] if identity["name"] == source.name]
                texts_after(source, [SourceIdentity.model_validate(i) for i in old], tokenizer, recipe)


def texts_after(
    source: Source, identities: Sequence[SourceIdentity], tokenizer: PreTrainedTokenizerFast, recipe: CacheRecipe
) -> SourceReader:
    """A reader of a source that has taken the documents that were planned; MismatchError if those are not what they were."""
    reader = SourceReader(source, tokenizer, known_skips=sum(identity.num_skipped_rows for identity in identities))
    for identity in identities:
        old = Tally(source, 0, reader.rows())
        for text in islice(reader.documents(), identity.num_documents):
            old.see(text)
        if old.fingerprint != identity.fingerprint:
            raise MismatchError(
                f"documents of the source {source.name} are not what they were",
                expected=identity.fingerprint,
                found=old.fingerprint,
                where=recipe.cache,
                remedy="Give new documents a source of their own, or put them at the end.",
            )
    return reader


def make_plan(recipe: CacheRecipe, objects: Objects, processes: int = 1) -> None:
    """Make and commit the plan of a settled recipe; where a manifest is left of one that is gone, the same plan."""
    known = find_document(objects, MANIFEST)
    manifest = None if known is None else parse_manifest(known.body, MANIFEST)
    if manifest is None:
        _refuse_occupied(objects)
    refuse_uncommittable(objects)
    with attempt_folder(objects, "plan") as (attempt, prefix):
        body = plan_body(recipe, objects, prefix, None if manifest is None else manifest.sources, processes)
        if manifest is not None and digest(body) != manifest.plan.digest:
            raise other_texts(manifest.plan.digest, digest(body), recipe)
        document, _ = commit(objects, PLAN, body, attempt, places=places_of(recipe))
    objects.delete_tree(prefix)
    if document.digest != digest(body):
        raise MismatchError("another worker planned other text", expected=digest(body), found=document.digest, where=PLAN)


def other_texts(expected: str, found: str, recipe: CacheRecipe) -> MismatchError:
    """The error for a plan that is made again and comes out otherwise."""
    return MismatchError(
        "the texts or the recipe are not what they were when the cache was planned",
        expected=expected,
        found=found,
        where=recipe.cache,
        remedy="Restore them, repair with the version of teacher-cache that made the cache, or build into another folder.",
    )


def _refuse_occupied(objects: Objects) -> None:
    """A new cache takes a folder of its own: `repair` and `seal` remove what they do not know there."""
    if isinstance(objects, LocalObjects) and objects.root.is_dir():
        found = sorted(path.name for path in objects.root.iterdir() if path.name != "ledger")
        if found:
            raise InputError(
                "the folder holds something else", expected="an empty or new one", found=", ".join(found[:5]), where=objects.uri
            )


def plan_body(
    recipe: CacheRecipe, objects: Objects, prefix: str, known: Sequence[SourceIdentity] | None, processes: int = 1
) -> dict[str, Any]:
    """The body of the plan of a settled recipe; its units and tokenizer files are published. `known`: plan exactly these sources'
    documents, of which the recipe may have more by now."""
    if recipe.base is not None:
        return _overlay_body(recipe, objects)
    if known is not None:
        recipe = _only(recipe, known)
    limits = {} if known is None else {source.name: source for source in known}
    refuse_beyond_teacher(recipe)
    tokenizer = load_recipe_tokenizer(recipe)
    if recipe.append_eos and tokenizer.eos_token_id is None and any(source.messages is None for source in recipe.sources):
        raise InputError(
            "the tokenizer has no end-of-text token", expected="one, or append_eos: false", found="none", where="append_eos"
        )
    tallies = [
        Tally.of(SourceReader(source, tokenizer), number, until=limits.get(source.name))
        for number, source in enumerate(recipe.sources)
    ]
    staged = stage_units(recipe, objects, prefix, tokenizer, tallies, None, processes)
    refuse_useless(tallies)
    refuse_empty_signals(recipe.signals, recipe.context, staged.needs)
    files = _kept_tokenizer_files(objects, tokenizer)
    publish_units(objects, prefix, staged.units, first=0)
    return {
        "recipe": planned_part(recipe),
        "base": None,
        "tokenizer": {
            "digest": tokenizer_digest(tokenizer),
            "vocab_size": vocabulary_size(tokenizer),
            "files": {name: sha256(data) for name, data in files.items()},
        },
        "sources": [tally.identity().model_dump(mode="json") for tally in tallies],
        "capacities": staged.needs.model_dump(mode="json"),
        "units": staged.units,
    }


def _only(recipe: CacheRecipe, known: Sequence[SourceIdentity]) -> CacheRecipe:
    by_name = {source.name: source for source in recipe.sources}
    if missing := [source.name for source in known if source.name not in by_name]:
        raise MismatchError("the recipe lacks a source of the cache", expected=", ".join(missing), where=recipe.cache)
    return recipe.model_copy(update={"sources": tuple(by_name[source.name] for source in known)})


def _kept_tokenizer_files(objects: Objects, tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """The tokenizer's files as the cache keeps them: who comes first writes them, whoever's plan is taken names those."""
    kept = {}
    for name, data in tokenizer_files(tokenizer).items():
        objects.create(tokenizer_key(name), data)
        kept[name] = objects.read(tokenizer_key(name))
    return kept


def _overlay_body(recipe: CacheRecipe, objects: Objects) -> dict[str, Any]:
    """The base's plan, copied; only the room for its own signals is this cache's."""
    assert recipe.base is not None
    below = objects_at(recipe.base)
    base = read_plan(below)
    _refuse_base(recipe, base, below)
    needs = NO_ROOM
    with progress_bar() as progress:
        bar = progress.add_task("plan", total=base.num_units, unit="units")
        for number, unit in enumerate(base.units):
            data = below.read(plan_unit_key(number, unit["digest"]))
            planned_unit = UnitPlan.from_bytes(data, unit["digest"], recipe.base)
            needs = needs.union(capacities_of(planned_unit, recipe.signals, recipe.context))
            objects.put(plan_unit_key(number, unit["digest"]), data)
            progress.advance(bar)
    refuse_empty_signals(recipe.signals, recipe.context, needs)
    for name in base.document.body["tokenizer"]["files"]:
        objects.put(tokenizer_key(name), below.read(tokenizer_key(name)))
    return {
        **base.document.body,
        "recipe": {**base.recipe, **planned_part(recipe)},
        "base": base.digest,
        "capacities": needs.model_dump(mode="json"),
    }


def _refuse_base(recipe: CacheRecipe, base: Plan, below: Objects) -> None:
    """What could only be refused when the overlay is opened, after all its work."""
    if base.document.body["base"] is not None:
        raise InputError("an overlay stands on a cache with text", expected="a base that is no overlay", found=recipe.base)
    if base.extensions:
        raise InputError(
            "an overlay stands on a cache that was not extended", found=f"{len(base.extensions)} extensions", where=recipe.base
        )
    frozen = find_document(below, MANIFEST)
    if frozen is not None:
        held = {name for name, signal in parse_manifest(frozen.body, MANIFEST).signals if signal is not None}
        twice = sorted(held & {name for name, signal in recipe.signals if signal is not None})
        if twice:
            raise InputError("the base holds this signal", expected="others", found=", ".join(twice), where=recipe.base)
    attention = recipe.signals.attention
    if attention is not None and list(attention.keywords) != base.recipe["keywords"]:
        raise MismatchError(
            "an overlay has its base's keywords",
            expected=base.recipe["keywords"],
            found=list(attention.keywords),
            where="signals.attention",
        )
