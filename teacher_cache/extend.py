"""extend: append new documents to a sealed cache as new units. The cache id stays; readers of an older generation never notice.

New are sources that the recipe names beside the old ones, and documents at the end of an old source. The order of commits: the
extension's plan, its units, the metadata that shows them, the next seal.
"""

from collections.abc import Iterator
from itertools import chain, islice

from signal_store.cache import Cache, newest_generation, open_cache
from signal_store.canonical import digest
from signal_store.errors import IncompleteError, InputError, MismatchError
from signal_store.ledger import attempt_folder, commit, extension_key, read_document, seal_key
from signal_store.manifest import SourceIdentity
from signal_store.objects import Objects, objects_at
from teacher_cache.corpus.document import Document as Text
from teacher_cache.corpus.sources import documents
from teacher_cache.fill import fill
from teacher_cache.plan import Plan, planned_part, read_plan, refuse_another_recipe
from teacher_cache.recipe import CacheRecipe, Source
from teacher_cache.seal import seal
from teacher_cache.unit_staging import Tally, load_recipe_tokenizer, publish_units, rounded, stage_units
from teacher_cache.workers import ALONE, Worker


def extend(recipe: CacheRecipe, worker: Worker = ALONE) -> Cache:
    """Plan what is new, fill it, and seal the next generation. Goes on where it stopped."""
    if recipe.base is not None:
        raise InputError("an overlay is not extended", expected="its base", found=recipe.cache)
    objects = objects_at(recipe.cache)
    newest = newest_generation(objects)
    if newest is None:
        raise IncompleteError("the cache is not sealed", where=recipe.cache, remedy="Run teacher-cache build first.")
    planned = read_plan(objects)
    sealed_units = read_document(objects, seal_key(newest)).body["num_units"]
    if sealed_units == planned.num_units and worker.should_make(objects, "extension", extension_key(len(planned.extensions) + 1)):
        plan_extension(recipe, objects, planned)
    fill(recipe, worker)
    seal(recipe.cache)
    return open_cache(recipe.cache)


def plan_extension(recipe: CacheRecipe, objects: Objects, planned: Plan) -> None:
    """Commit the plan of the new documents; InputError if there are none, MismatchError if old ones are not what they were."""
    refuse_another_recipe("planned", planned.recipe, planned_part(recipe), recipe, ignore="sources")
    tokenizer = load_recipe_tokenizer(recipe)
    if missing := {source.name for source in planned.sources} - {source.name for source in recipe.sources}:
        raise MismatchError("the recipe lacks a source of the cache", expected=", ".join(sorted(missing)), where=recipe.cache)
    tallies: list[Tally] = []
    for source in recipe.sources:
        texts = documents(source, tokenizer)
        old = [identity for identity in planned.sources if identity.name == source.name]
        for identity in old:
            _read_again(source, identity, texts, recipe)
        for text in texts:
            number = len(planned.sources) + len(tallies)
            first = sum(identity.num_documents for identity in old)
            tallies.append(Tally(source, number, chain([text], texts), first_document=first))
            break
    if not tallies:
        raise InputError("nothing to extend with", expected="new documents or sources", found="none", where=recipe.cache)
    with attempt_folder(objects, "plan") as (attempt, prefix):
        staged = stage_units(recipe, objects, prefix, tokenizer, tallies, rounded(planned.capacities))
        body = {
            "parent": (planned.extensions[-1] if planned.extensions else planned.document).digest,
            "sources": [tally.identity().model_dump(mode="json") for tally in tallies],
            "units": staged.units,
        }
        publish_units(objects, prefix, staged.units, first=planned.num_units)
        document, _ = commit(objects, extension_key(len(planned.extensions) + 1), body, attempt)
    objects.delete_tree(prefix)
    if document.digest != digest(body):
        raise MismatchError("another worker extended by other text", expected=digest(body), found=document.digest)


def _read_again(source: Source, identity: SourceIdentity, texts: Iterator[Text], recipe: CacheRecipe) -> None:
    """Pass over a source's old documents; MismatchError if they are not what they were."""
    old = Tally(source, 0, texts)
    for text in islice(texts, identity.num_documents):
        old.see(text)
    if old.identity().fingerprint != identity.fingerprint:
        raise MismatchError(
            f"documents of the source {source.name} are not what they were",
            expected=identity.fingerprint,
            found=old.identity().fingerprint,
            where=recipe.cache,
            remedy="Give new documents a source of their own, or put them at the end.",
        )
