"""An extension of a plan: new sources, and documents at the end of old ones, as units after those that are there.

Policy: the recipe must read what is planned as it was read; what an extension holds is committed as its own document.
"""

from collections.abc import Sequence
from typing import Any

from signal_store.canonical import digest
from signal_store.errors import CorruptError, InputError, MismatchError
from signal_store.ledger.documents import attempt_folder, commit, extension_key, finished_units
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.recipe_parts import completed_plan, completed_source, planned_part, refuse_another_recipe, source_part
from teacher_cache.builder.session import BuildSession
from teacher_cache.builder.source_stats import SourceStats, refuse_useless
from teacher_cache.builder.unit_staging import publish_units, rounded, stage_units
from teacher_cache.recipe import Source


def refuse_other_texts(session: BuildSession) -> None:
    """MismatchError where the recipe decides the plan otherwise than it was decided, but for sources that are new."""
    recipe, planned = session.recipe, session.plan
    refuse_another_recipe("planned", completed_plan(planned.recipe), planned_part(recipe), recipe, ignore="sources")
    if recipe.has_tags and not planned.has_tags:
        raise MismatchError("the cache holds no tags", expected="sources without a tagger", found="one with", where=recipe.cache)
    _refuse_changed_sources(recipe.sources, planned, recipe.cache)


def _refuse_changed_sources(sources: Sequence[Source], planned: Plan, where: str) -> None:
    """MismatchError where a source of the cache is gone from the recipe, or is read in another way than it was."""
    by_name = {source.name: source for source in sources}
    if missing := {source.name for source in planned.sources} - by_name.keys():
        raise MismatchError("the recipe lacks a source of the cache", expected=", ".join(sorted(missing)), where=where)
    parts = [*planned.recipe["sources"], *(part for document in planned.extensions for part in document.body["recipe_sources"])]
    for part in map(completed_source, parts):
        now = source_part(by_name[part["name"]])
        changed = sorted(key for key in now.keys() | part.keys() if key != "max_documents" and now.get(key) != part.get(key))
        if changed:
            raise MismatchError(
                f"the source {part['name']} is read otherwise than before",
                expected={key: part.get(key) for key in changed},
                found={key: now.get(key) for key in changed},
                where=where,
                remedy="Restore its section, or give the new documents a source of their own.",
            )


def plan_extension(session: BuildSession, texts: Sequence[SourceStats]) -> None:
    """Commit the plan of the new documents; MismatchError if another process extends by others at the same time."""
    objects, planned = session.objects, session.plan
    if stray := sorted(unit for unit in finished_units(objects) if unit >= planned.num_units):
        raise CorruptError(
            "units are recorded that no plan knows", found=stray[:5], where=objects.uri, remedy="Run teacher-cache repair."
        )
    with attempt_folder(objects, "plan") as (attempt, prefix):
        body = extension_body(session, texts, prefix)
        known = {source.name for source in planned.sources}
        refuse_useless([stats for stats in texts if stats.source.name not in known])
        if not body["units"]:
            raise InputError("nothing to extend with", expected="new documents with text", found="empty ones", where=objects.uri)
        document, _ = commit(objects, next_extension(planned), body, attempt)
    objects.delete_tree(prefix)
    if document.digest != digest(body):
        raise MismatchError(
            "another process extended by other text", expected=digest(body), found=document.digest, remedy="Run extend again."
        )


def next_extension(planned: Plan) -> str:
    """Where the extension that follows a plan is kept."""
    return extension_key(len(planned.extensions) + 1)


def extension_body(session: BuildSession, texts: Sequence[SourceStats], prefix: str) -> dict[str, Any]:
    """The body of the extension that follows the session's plan; its units are published."""
    planned, processes = session.plan, session.worker.processes
    room = rounded(planned.capacities)
    staged = stage_units(session.recipe, session.objects, prefix, session.tokenizer, list(texts), room, processes)
    publish_units(session.objects, prefix, staged.units, first=planned.num_units)
    return {
        "parent": (planned.extensions[-1] if planned.extensions else planned.document).digest,
        "recipe_sources": [_part(stats.source) for stats in texts],
        "sources": [stats.identity().model_dump(mode="json") for stats in texts],
        "units": staged.units,
    }


def _part(source: Source) -> dict[str, Any]:
    return {name: value for name, value in source_part(source).items() if name != "max_documents"}
