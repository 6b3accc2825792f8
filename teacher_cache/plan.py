"""plan: texts to tokens, segments and units. A pure function of recipe and data; the first to commit wins.

An overlay stands on another cache's plan: same units, same tokens, its own signals. An extension appends units for new documents.
"""

from dataclasses import dataclass
from typing import Any

from model_taps.loading import load_config, tokenizer_digest
from signal_store.canonical import digest, sha256
from signal_store.errors import InputError, MismatchError, NotFoundError
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
from signal_store.manifest import Capacities, SourceIdentity
from signal_store.objects import Objects, objects_at
from signal_store.progress import progress_bar
from teacher_cache.corpus.sources import documents
from teacher_cache.positions import capacities_of
from teacher_cache.recipe import CacheRecipe
from teacher_cache.unit_plan import UnitPlan
from teacher_cache.unit_staging import NO_ROOM, Tally, load_recipe_tokenizer, publish_units, stage_units, tokenizer_files
from teacher_cache.workers import ALONE, Worker


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
            make_plan(recipe, objects)
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
    return {**part, "unit_tokens": recipe.resolved_unit_tokens, "keywords": list(recipe.keywords), **positions}


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


def make_plan(recipe: CacheRecipe, objects: Objects) -> None:
    """Make and commit the plan of a settled recipe."""
    _make_overlay(recipe, objects) if recipe.base is not None else _make(recipe, objects)


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
        files = tokenizer_files(tokenizer)
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
