"""plan: texts to tokens, segments and units. A pure function of recipe and data; the first to commit wins."""

from collections.abc import Sequence
from typing import Any

from model_taps.loading import tokenizer_digest, vocabulary_size
from signal_store.canonical import digest, sha256
from signal_store.errors import InputError, MismatchError, NotFoundError
from signal_store.io.commit_check import refuse_uncommittable
from signal_store.io.local import LocalObjects
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import MANIFEST, PLAN, attempt_folder, commit, find_document
from signal_store.manifest import SourceIdentity, parse_manifest
from teacher_cache.builder.overlay import overlay_body
from teacher_cache.builder.plan import Plan, read_plan
from teacher_cache.builder.planned_texts import places_of, refuse_moved_text
from teacher_cache.builder.quality import with_quality
from teacher_cache.builder.recipe_parts import completed_plan, planned_part, refuse_another_recipe
from teacher_cache.builder.source_stats import SourceStats, refuse_useless
from teacher_cache.builder.tokenizer import kept_tokenizer_files, load_recipe_tokenizer
from teacher_cache.builder.unit_staging import publish_units, stage_units
from teacher_cache.corpus.sources import SourceReader
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.limits import refuse_beyond_teacher
from teacher_cache.signals.registry import refuse_empty_signals
from teacher_cache.worker import ALONE, Worker


def ensure_plan(recipe: CacheRecipe, worker: Worker = ALONE) -> Plan:
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
    refuse_moved_text(recipe.sources, planned, recipe.teacher, recipe.cache)
    return planned


def settled(recipe: CacheRecipe) -> CacheRecipe:
    """The recipe with what it leaves to others: the quality of the distribution; an overlay's text, which is its base's."""
    recipe = with_quality(recipe, objects_at(recipe.cache))
    if recipe.base is None:
        return recipe
    base = read_plan(objects_at(recipe.base)).recipe
    if recipe.batch_tokens < base["context"]:
        raise InputError("batch_tokens must hold one context", expected=f"at least {base['context']}", found=recipe.batch_tokens)
    return recipe.model_copy(update={name: base[name] for name in ("context", "overlap", "append_eos", "unit_tokens")})


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
            raise other_texts(manifest.plan.digest, digest(body), recipe.cache)
        document, _ = commit(objects, PLAN, body, attempt, places=places_of(recipe.sources))
    objects.delete_tree(prefix)
    if document.digest != digest(body):
        raise MismatchError("another worker planned other text", expected=digest(body), found=document.digest, where=PLAN)


def other_texts(expected: str, found: str, where: str) -> MismatchError:
    """The error for a plan that is made again and comes out otherwise."""
    return MismatchError(
        "the texts or the recipe are not what they were when the cache was planned",
        expected=expected,
        found=found,
        where=where,
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
        return overlay_body(recipe, objects)
    if known is not None:
        recipe = _only(recipe, known)
    limits = {} if known is None else {source.name: source for source in known}
    refuse_beyond_teacher(recipe)
    tokenizer = load_recipe_tokenizer(recipe.teacher)
    if recipe.append_eos and tokenizer.eos_token_id is None and any(source.messages is None for source in recipe.sources):
        raise InputError(
            "the tokenizer has no end-of-text token", expected="one, or append_eos: false", found="none", where="append_eos"
        )
    all_stats = [
        SourceStats.of(SourceReader(source, tokenizer), number, until=limits.get(source.name))
        for number, source in enumerate(recipe.sources)
    ]
    staged = stage_units(recipe, objects, prefix, tokenizer, all_stats, None, processes)
    refuse_useless(all_stats)
    refuse_empty_signals(recipe.signals, recipe.context, staged.needs)
    files = kept_tokenizer_files(objects, tokenizer)
    publish_units(objects, prefix, staged.units, first=0)
    return {
        "recipe": planned_part(recipe),
        "base": None,
        "tokenizer": {
            "digest": tokenizer_digest(tokenizer),
            "vocab_size": vocabulary_size(tokenizer),
            "files": {name: sha256(data) for name, data in files.items()},
        },
        "sources": [stats.identity().model_dump(mode="json") for stats in all_stats],
        "capacities": staged.needs.model_dump(mode="json"),
        "units": staged.units,
    }


def _only(recipe: CacheRecipe, known: Sequence[SourceIdentity]) -> CacheRecipe:
    by_name = {source.name: source for source in recipe.sources}
    if missing := [source.name for source in known if source.name not in by_name]:
        raise MismatchError("the recipe lacks a source of the cache", expected=", ".join(missing), where=recipe.cache)
    return recipe.model_copy(update={"sources": tuple(by_name[source.name] for source in known)})
