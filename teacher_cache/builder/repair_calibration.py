"""Calibration, its matrices and the manifest, where they are damaged: from the other copy, or from the teacher.

Policy: what comes out must be, to the digest, what the rest of the ledger expects; else nothing is replaced.
"""

from safetensors.numpy import save

from signal_store.canonical import digest, sha256
from signal_store.errors import CorruptError, MismatchError
from signal_store.io.objects import Objects
from signal_store.ledger.catalogue import calibration_entries, manifest_entries
from signal_store.ledger.documents import CALIBRATION, MANIFEST, calibration_keys, new_attempt
from signal_store.ledger.entries import Entry, Ledger, Origin
from teacher_cache.builder.calibrate import calibration_body, load_recipe_teacher, manifest_of, read_calibration_arrays
from teacher_cache.builder.repair_texts import replace_damaged
from teacher_cache.builder.session import BuildSession
from teacher_cache.teacher.dtype import with_dtype


def repair_calibration(session: BuildSession, ledger: Ledger) -> list[str]:
    """Make calibration, its two copies of the matrices, and manifest whole; the keys that were not."""
    remade = []
    document = next(entry for entry in calibration_entries(ledger) if entry.key == CALIBRATION)
    is_whole = ledger.fault(document) is None
    data = _matrices(session.objects, ledger.require(CALIBRATION).body["arrays_digest"]) if is_whole else None
    if data is None:
        data = _remake_calibration(session, ledger, document, is_whole=is_whole)
        remade += [] if is_whole else [CALIBRATION]
    copies = [Entry(key, Origin.CALIBRATION, sha256(data)) for key in calibration_keys(sha256(data))]
    for entry in ledger.failing(copies):
        remade.append(entry.key)
        session.objects.put(entry.key, data)
    for entry in ledger.failing(manifest_entries(ledger)):
        recipe, _ = with_dtype(session.recipe, session.objects)
        manifest = manifest_of(recipe, session.plan.at_generation(0), ledger.require(CALIBRATION).body)
        replace_damaged(ledger, entry, manifest.body, new_attempt(), recipe.cache)
        remade.append(MANIFEST)
    return remade


def _remake_calibration(session: BuildSession, ledger: Ledger, document: Entry, *, is_whole: bool) -> bytes:
    """The matrices, fitted again; the document that names them is replaced unless it is whole."""
    recipe, _ = with_dtype(session.recipe, session.objects)
    plan = session.plan.at_generation(0)  # what it was calibrated on
    teacher = load_recipe_teacher(recipe, plan.vocab_size)
    body, data = calibration_body(recipe, plan, teacher, session.objects)
    expected = ledger.require(CALIBRATION).digest if is_whole else document.digest
    arrays = body["arrays_digest"] if ledger.manifest is None else ledger.manifest.calibration.digest
    if (expected is not None and digest(body) != expected) or body["arrays_digest"] != arrays:
        raise MismatchError(
            "the calibration comes out otherwise here",
            expected=expected or arrays,
            found=digest(body),
            where=CALIBRATION,
            remedy="Repair on the kind of machine, and with the recipe and teacher, that made it.",
        )
    if not is_whole:
        replace_damaged(ledger, document, body, new_attempt(), recipe.cache)
    return data


def _matrices(objects: Objects, content: str) -> bytes | None:
    try:
        return save(read_calibration_arrays(objects, content))
    except CorruptError:
        return None
