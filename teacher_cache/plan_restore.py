"""A plan that is damaged is made again from the recipe's texts: it is a pure function of them."""

from collections.abc import Iterator
from itertools import islice

from transformers import PreTrainedTokenizerFast

from signal_store.canonical import sha256
from signal_store.errors import MismatchError
from signal_store.ledger import PLAN, attempt_folder, plan_unit_key, tokenizer_key
from signal_store.manifest import SourceIdentity
from signal_store.objects import Objects, objects_at
from teacher_cache.corpus.sources import documents
from teacher_cache.plan import Plan, make_plan, read_plan, settled
from teacher_cache.recipe import CacheRecipe
from teacher_cache.unit_staging import Tally, load_recipe_tokenizer, rounded, stage_units, tokenizer_files


def restore_plan(recipe: CacheRecipe, objects: Objects) -> None:
    """Make the plan again from the recipe's texts where it, a unit's plan or a tokenizer file is gone or altered.

    MismatchError if the texts are not what they were.
    """
    recipe = settled(recipe)
    if not objects.exists(PLAN):
        make_plan(recipe, objects)
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
    for name, data in tokenizer_files(tokenizer).items():
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
