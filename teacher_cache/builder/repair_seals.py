"""Seals, and what no unit owns, where they are damaged: from manifest, plan and records.

Policy: the seal of an older generation is remade only if it is what the next one says of it.
"""

from collections.abc import Sequence

from signal_store.canonical import digest, sha256
from signal_store.errors import CorruptError
from signal_store.ledger.catalogue import constant_entries, seal_entries
from signal_store.ledger.documents import (
    UnitRecord,
    listed_seals,
    new_attempt,
    newest_generation,
    newest_records,
    replace_document,
    seal_key,
)
from signal_store.ledger.entries import Entry, Ledger
from signal_store.ledger.seal import Seal
from signal_store.sealed_part import sealed_metadata
from teacher_cache.builder.generation import Draft, draft_generation, publish_constants, write_metadata
from teacher_cache.builder.seal import seal_cache
from teacher_cache.builder.session import BuildSession


def repair_seals(session: BuildSession, ledger: Ledger) -> list[str]:
    """Make the seals of older generations, and a damaged newest one, again; the keys that were not whole."""
    failed = ledger.failing(seal_entries(ledger))
    records = standing_records(session)
    for entry in failed:
        number = next(n for n in range(max(ledger.generations) + 1) if seal_key(n) == entry.key)
        draft = _fitting_draft(session, ledger, entry, number, records)
        publish_constants(session.objects, draft)
        if number == max(ledger.generations):
            write_metadata(session.objects, draft.metadata)
        replace_document(session.objects, entry.key, draft.body, new_attempt())
        ledger.forget(entry.key)
        session.objects.delete_tree(draft.prefix)
    return [entry.key for entry in failed]


def _fitting_draft(session: BuildSession, ledger: Ledger, entry: Entry, number: int, records: Sequence[UnitRecord]) -> Draft:
    """What a generation was: of the plans that it may have covered the one that the next seal, or the last, speaks of."""
    is_newest = number == max(ledger.generations)
    if not is_newest and entry.digest is None:
        raise CorruptError("two seals in a row are damaged", where=entry.key)
    seals = ledger.seals
    least = seals[number - 1].num_extensions if number - 1 in seals else 0
    most = seals[number + 1].num_extensions if number + 1 in seals else len(session.plan.extensions)
    for extensions in range(most, least - 1, -1):
        plan = session.plan.at_generation(extensions)
        if plan.num_units > len(records):
            continue
        draft = draft_generation(session.objects, plan, session.manifest, records[: plan.num_units], number)
        if is_newest or digest(draft.body) == entry.digest:
            return draft
        session.objects.delete_tree(draft.prefix)
    raise CorruptError("a seal cannot be made again from the units as they are now", where=entry.key, remedy="Restore this object.")


def standing_records(session: BuildSession) -> list[UnitRecord]:
    """The newest records of the units from the first on, up to one that has none."""
    found: list[UnitRecord] = []
    for document in newest_records(session.objects, session.plan.num_units):
        if document is None:
            break
        found.append(UnitRecord.from_body(document.body))
    return found


def seal_if_complete(session: BuildSession) -> None:
    """Seal what is finished: the next generation where records are not those of the newest seal. An extension that is being made
    is left as it is."""
    if len(standing_records(session)) == session.plan.num_units:
        seal_cache(session.objects)
    elif newest_generation(session.objects) is None:
        raise CorruptError("the cache was never sealed", where=session.recipe.cache, remedy="Run teacher-cache build.")


def repair_constants(session: BuildSession) -> list[str]:
    """Write again the damaged objects that no unit owns, where they come out here as they were sealed; the keys that were not
    whole."""
    ledger = Ledger(session.objects, listed_seals(session.objects))
    left = {entry.key: str(entry.digest) for entry in ledger.failing(constant_entries(ledger))}
    damaged = list(left)
    records = standing_records(session) if left else []
    for sealed in ledger.seals.values() if left else ():
        for key, data in sealed_metadata(session.manifest, sealed).items():
            if left.get(key) == sha256(data):
                session.objects.put(key, data)
                del left[key]
        _restore_constants(session, sealed, records, left)
    return damaged


def _restore_constants(session: BuildSession, sealed: Seal, records: Sequence[UnitRecord], left: dict[str, str]) -> None:
    """Publish what of a generation is in `left` (key to digest), and take it out there."""
    plan = session.plan.at_generation(sealed.num_extensions)
    if not left.keys() & sealed.constants.keys() or len(records) < plan.num_units:
        return
    draft = draft_generation(session.objects, plan, session.manifest, records[: plan.num_units], sealed.generation)
    for key, content in draft.staged.items():
        if left.get(key) == content:
            session.objects.publish(f"{draft.prefix}/{key}", key)
            del left[key]
    session.objects.delete_tree(draft.prefix)
