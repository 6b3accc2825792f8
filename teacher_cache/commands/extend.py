"""extend: append new documents to a sealed cache as new units. The cache id stays; readers of an older generation never notice.

New are sources that the recipe names beside the old ones, and documents at the end of an old source. Recipe and teacher are checked
before anything is committed; then the extension's plan, its units, the metadata that shows them, the next seal. An extension that
was begun is finished first, and only by a recipe that holds its documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from signal_store.cache import Cache, newest_generation, open_cache
from signal_store.canonical import digest
from signal_store.errors import CorruptError, IncompleteError, InputError, MismatchError
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import attempt_folder, commit, extension_key, read_document, seal_key
from signal_store.manifest import SourceIdentity
from teacher_cache.builder.calibrate import calibrate_planned
from teacher_cache.builder.fill import fill_units, finished_units
from teacher_cache.builder.plan import Plan, read_plan, texts_after
from teacher_cache.builder.recipe_parts import completed_plan, completed_source, planned_part, refuse_another_recipe, source_part
from teacher_cache.builder.seal import seal
from teacher_cache.builder.unit_staging import Tally, load_plan_tokenizer, publish_units, refuse_useless, rounded, stage_units
from teacher_cache.builder.workers import ALONE, Worker
from teacher_cache.recipe import CacheRecipe, Source


def extend(recipe: CacheRecipe, worker: Worker = ALONE) -> Cache:
    """Plan what is new, fill it, and seal the next generation. Goes on where it stopped."""
    if recipe.base is not None:
        raise InputError("an overlay is not extended", expected="its base", found=recipe.cache)
    objects = objects_at(recipe.cache)
    newest = newest_generation(objects)
    if newest is None:
        raise IncompleteError("the cache is not sealed", where=recipe.cache, remedy="Run teacher-cache build first.")
    planned = read_plan(objects)
    refuse_another_recipe("planned", completed_plan(planned.recipe), planned_part(recipe), recipe, ignore="sources")
    if recipe.has_tags and not planned.has_tags:
        raise MismatchError("the cache holds no tags", expected="sources without a tagger", found="one with", where=recipe.cache)
    _refuse_changed_sources(recipe, planned)
    new = list(_new_texts(recipe, planned))
    pending = planned.num_units > int(read_document(objects, seal_key(newest)).body["num_units"])
    if not new and not pending:
        raise InputError("nothing to extend with", expected="new documents or sources", found="none", where=recipe.cache)
    calibrated = calibrate_planned(recipe, planned, worker)
    if pending:
        fill_units(calibrated, objects, worker)
        seal(recipe.cache)
    if new:
        key = extension_key(len(planned.extensions) + 1)
        if worker.should_make(objects, "extension", key):
            plan_extension(recipe, objects, planned, new, worker.processes)
        fill_units(replace(calibrated, plan=read_plan(objects)), objects, worker)
        seal(recipe.cache)
    return open_cache(recipe.cache)


def _refuse_changed_sources(recipe: CacheRecipe, planned: Plan) -> None:
    """MismatchError where a source of the cache is gone from the recipe, or is read in another way than it was."""
    by_name = {source.name: source for source in recipe.sources}
    if missing := {source.name for source in planned.sources} - by_name.keys():
        raise MismatchError("the recipe lacks a source of the cache", expected=", ".join(sorted(missing)), where=recipe.cache)
    parts = [*planned.recipe["sources"], *(part for document in planned.extensions for part in document.body["recipe_sources"])]
    for part in map(completed_source, parts):
        now = source_part(by_name[part["name"]])
        changed = sorted(key for key in now.keys() | part.keys() if key != "max_documents" and now.get(key) != part.get(key))
        if changed:
            raise MismatchError(
                f"the source {part['name']} is read otherwise than before",
                expected={key: part.get(key) for key in changed},
                found={key: now.get(key) for key in changed},
                where=recipe.cache,
                remedy="Restore its section, or give the new documents a source of their own.",
            )


def _new_texts(recipe: CacheRecipe, planned: Plan) -> Iterator[Tally]:
    """The sources with documents that no plan holds yet; MismatchError where planned ones are not what they were."""
    tokenizer = load_plan_tokenizer(recipe, planned.document.body["tokenizer"]["digest"])
    number = len(planned.sources)
    for source in recipe.sources:
        old = [identity for identity in planned.sources if identity.name == source.name]
        reader = texts_after(source, old, tokenizer, recipe)
        tally = Tally.of(reader, number, after=old)
        if not tally.is_full and (not old or reader.has_more()):  # of a new source, nothing is read before all is checked
            yield tally
            number += 1


def plan_extension(recipe: CacheRecipe, objects: Objects, planned: Plan, tallies: Sequence[Tally], processes: int = 1) -> None:
    """Commit the plan of the new documents; MismatchError if another process extends by others at the same time."""
    if stray := sorted(unit for unit in finished_units(objects) if unit >= planned.num_units):
        raise CorruptError(
            "units are recorded that no plan knows", found=stray[:5], where=recipe.cache, remedy="Run teacher-cache repair."
        )
    with attempt_folder(objects, "plan") as (attempt, prefix):
        body = extension_body(recipe, objects, prefix, planned, tallies, processes)
        known = {source.name for source in planned.sources}
        refuse_useless([tally for tally in tallies if tally.source.name not in known])
        if not body["units"]:
            raise InputError("nothing to extend with", expected="new documents with text", found="empty ones", where=recipe.cache)
        document, _ = commit(objects, extension_key(len(planned.extensions) + 1), body, attempt)
    objects.delete_tree(prefix)
    if document.digest != digest(body):
        raise MismatchError(
            "another process extended by other text", expected=digest(body), found=document.digest, remedy="Run extend again."
        )


def extension_body(
    recipe: CacheRecipe, objects: Objects, prefix: str, planned: Plan, tallies: Sequence[Tally], processes: int = 1
) -> dict[str, Any]:
    """The body of the extension that follows `planned`; its units are published."""
    tokenizer = load_plan_tokenizer(recipe, planned.document.body["tokenizer"]["digest"])
    staged = stage_units(recipe, objects, prefix, tokenizer, list(tallies), rounded(planned.capacities), processes)
    publish_units(objects, prefix, staged.units, first=planned.num_units)
    return {
        "parent": (planned.extensions[-1] if planned.extensions else planned.document).digest,
        "recipe_sources": [_part(tally.source) for tally in tallies],
        "sources": [tally.identity().model_dump(mode="json") for tally in tallies],
        "units": staged.units,
    }


def _part(source: Source) -> dict[str, Any]:
    return {name: value for name, value in source_part(source).items() if name != "max_documents"}


def tallies_of(recipe: CacheRecipe, planned: Plan, identities: Sequence[SourceIdentity]) -> list[Tally]:
    """The sources of an extension that follows `planned`, each reading exactly its own documents."""
    by_name = {source.name: source for source in recipe.sources}
    tokenizer = load_plan_tokenizer(recipe, planned.document.body["tokenizer"]["digest"])
    tallies: list[Tally] = []
    for identity in identities:
        if identity.name not in by_name:
            raise MismatchError("the recipe lacks a source of the cache", expected=identity.name, found=", ".join(by_name))
        old = [known for known in planned.sources if known.name == identity.name]
        reader = texts_after(by_name[identity.name], old, tokenizer, recipe)
        tallies.append(Tally.of(reader, len(planned.sources) + len(tallies), after=old, until=identity))
    return tallies
