"""Plan, extensions, plans of units and tokenizer files that are damaged, made again from the texts.

Policy: nothing is replaced before what takes its place is there and is, to the digest, what the rest of the ledger expects of it. A
wrong recipe or changed texts therefore change nothing.
"""

from collections.abc import Mapping
from typing import Any

from signal_store.canonical import digest, sha256
from signal_store.errors import CorruptError, MismatchError
from signal_store.io.objects import objects_at
from signal_store.ledger.catalogue import plan_entry, planned_unit_entries, tokenizer_entries
from signal_store.ledger.documents import (
    EXTENSIONS,
    PLAN,
    TOKENIZER,
    attempt_folder,
    listed_records,
    replace_document,
    unit_key,
)
from signal_store.ledger.entries import Entry, Ledger
from signal_store.manifest import SourceIdentity
from teacher_cache.builder.extension import extension_body
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.planned_texts import same_texts
from teacher_cache.builder.planning import other_texts, plan_body
from teacher_cache.builder.session import BuildSession
from teacher_cache.builder.tokenizer import load_plan_tokenizer, tokenizer_files


def repair_texts(session: BuildSession, ledger: Ledger) -> list[str]:
    """Make plan, extensions, plans of units and tokenizer files whole; the keys that were not."""
    remade = []
    if ledger.fault(plan_entry(ledger, 0)) is not None:
        _remake_plan(session, ledger)
        remade.append(PLAN)
    plan = Plan(ledger.require(PLAN))
    remade += _remake_tokenizer(session, ledger, plan)
    listed = [int(key.rsplit("/", 1)[1].split(".")[0]) for key in session.objects.list(EXTENSIONS)]
    for number in range(1, 1 + max([*listed, ledger.num_extensions], default=0)):
        entry = plan_entry(ledger, number)
        if ledger.fault(entry) is not None:
            remade.append(entry.key)
            if not _remake_extension(session.with_plan(plan), ledger, entry, number):
                _forget_extension(session.with_plan(plan), entry)
                break
        plan = Plan(plan.document, (*plan.extensions, ledger.require(entry.key)))
    return remade + _remake_unit_plans(session.with_plan(plan), ledger)


def replace_damaged(ledger: Ledger, entry: Entry, body: Mapping[str, Any], attempt: str, where: str) -> None:
    """Put a document in the place of a damaged one; MismatchError where it is not what the ledger says that was."""
    if entry.digest is not None and digest(body) != entry.digest:
        raise other_texts(entry.digest, digest(body), where)
    replace_document(ledger.objects, entry.key, dict(body), attempt)
    ledger.forget(entry.key)


def _remake_plan(session: BuildSession, ledger: Ledger) -> None:
    manifest = ledger.manifest
    with attempt_folder(session.objects, "plan") as (attempt, prefix):
        body = plan_body(session.recipe, session.objects, prefix, None if manifest is None else manifest.sources)
        replace_damaged(ledger, plan_entry(ledger, 0), body, attempt, session.recipe.cache)
    session.objects.delete_tree(prefix)


def _remake_extension(session: BuildSession, ledger: Ledger, entry: Entry, number: int) -> bool:
    """False where no seal says what the extension held: then nothing that was sealed stands on it."""
    sources = ledger.sources_of(number)
    if sources is None:
        if entry.digest is not None:
            raise CorruptError("an extension and the seals beside it are damaged", where=entry.key)
        return False
    with attempt_folder(session.objects, "plan") as (attempt, prefix):
        texts = same_texts(session.recipe.sources, session.plan, sources, session.tokenizer, session.recipe.cache)
        replace_damaged(ledger, entry, extension_body(session, texts, prefix), attempt, session.recipe.cache)
    session.objects.delete_tree(prefix)
    return True


def _forget_extension(session: BuildSession, entry: Entry) -> None:
    """Remove a damaged extension that was never sealed, with its units' records: `extend` makes it again from the texts."""
    for unit, revision in list(listed_records(session.objects)):
        if unit >= session.plan.num_units:
            session.objects.delete(unit_key(unit, revision))
    session.objects.delete(entry.key)


def _remake_tokenizer(session: BuildSession, ledger: Ledger, plan: Plan) -> list[str]:
    broken = ledger.failing(tokenizer_entries(ledger))
    if not broken:
        return []
    recipe = session.recipe
    if recipe.base is None:
        tokenizer = load_plan_tokenizer(recipe.teacher, plan.document.body["tokenizer"]["digest"], recipe.cache)
        own = {f"{TOKENIZER}/{name}": data for name, data in tokenizer_files(tokenizer).items()}
    else:
        own = {entry.key: objects_at(recipe.base).read(entry.key) for entry in broken}
    for entry in broken:
        if entry.key not in own or sha256(own[entry.key]) != entry.digest:
            raise MismatchError(
                "a tokenizer file comes out otherwise here",
                expected=entry.digest,
                where=entry.key,
                remedy="Repair with the version of transformers that planned the cache.",
            )
        session.objects.put(entry.key, own[entry.key])
    return [entry.key for entry in broken]


def _remake_unit_plans(session: BuildSession, ledger: Ledger) -> list[str]:
    """Plan again each generation that has a damaged unit plan; its units land on their keys."""
    remade: list[str] = []
    first = 0
    for number, document in enumerate((session.plan.document, *session.plan.extensions)):
        entries = list(planned_unit_entries(document, first))
        first += len(entries)
        broken = ledger.failing(entries)
        if broken:
            _replan(session, number, [SourceIdentity.model_validate(source) for source in document.body["sources"]])
        if left := ledger.failing(broken):
            raise other_texts(str(left[0].digest), "others", session.recipe.cache)
        remade += [entry.key for entry in broken]
    return remade


def _replan(session: BuildSession, number: int, sources: list[SourceIdentity]) -> None:
    """Publish the plans of the units of the plan (0) or an extension again."""
    recipe = session.recipe
    with attempt_folder(session.objects, "plan") as (_, prefix):
        if number == 0:
            plan_body(recipe, session.objects, prefix, sources)
        else:
            before = session.with_plan(session.plan.at_generation(number - 1))
            texts = same_texts(recipe.sources, before.plan, sources, before.tokenizer, recipe.cache)
            extension_body(before, texts, prefix)
    session.objects.delete_tree(prefix)
