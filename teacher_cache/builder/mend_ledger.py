"""Damaged ledger documents, made again from what is left: texts, recipe, teacher, and what whole documents say of the others.

Policy: nothing is removed before what takes its place is there and is, to the digest, what the rest of the ledger expects of it. A
wrong recipe or changed texts therefore change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from safetensors.numpy import save

from signal_store.canonical import digest, sha256
from signal_store.errors import CorruptError, MismatchError, NotFoundError
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import (
    CALIBRATION,
    EXTENSIONS,
    MANIFEST,
    PLAN,
    Document,
    UnitRecord,
    attempt_folder,
    calibration_keys,
    extension_key,
    listed_records,
    new_attempt,
    parse_document,
    plan_unit_key,
    read_document,
    replace_document,
    seal_key,
    tokenizer_key,
    unit_key,
)
from signal_store.ledger.seal import Seal
from signal_store.manifest import Manifest, SourceIdentity, parse_manifest
from teacher_cache.builder.calibrate import (
    calibration_body,
    load_recipe_teacher,
    manifest_of,
    read_calibration_arrays,
)
from teacher_cache.builder.plan import Plan, other_texts, plan_body, read_plan, settled
from teacher_cache.builder.seal import draft_generation, listed_seals, write_metadata
from teacher_cache.builder.unit_staging import load_plan_tokenizer, load_recipe_tokenizer, tokenizer_files
from teacher_cache.commands.extend import extension_body, tallies_of
from teacher_cache.recipe import CacheRecipe
from teacher_cache.teacher.dtype import with_dtype


def whole_document(objects: Objects, key: str) -> Document | None:
    """The document, if it is there and whole to the byte, `about` too. A store that fails to answer is no damage: it raises."""
    try:
        data = objects.read(key)
        document = parse_document(data, key)
    except (CorruptError, NotFoundError):
        return None
    return document if document.to_bytes() == data else None


@dataclass(frozen=True, slots=True)
class Known:
    """What whole documents say: the manifest, and the seals by generation."""

    manifest: Manifest | None
    seals: dict[int, Seal]

    @classmethod
    def of(cls, objects: Objects) -> "Known":
        """Read them."""
        frozen = whole_document(objects, MANIFEST)
        found = {number: whole_document(objects, seal_key(number)) for number in listed_seals(objects)}
        seals = {number: Seal.from_body(document.body) for number, document in found.items() if document is not None}
        return cls(None if frozen is None else parse_manifest(frozen.body, MANIFEST), seals)

    def digest_of(self, key: str) -> str | None:
        """The digest that a ledger document must have, if a seal or the manifest says it."""
        if key == PLAN and self.manifest is not None:
            return self.manifest.plan.digest
        if key == MANIFEST:
            return next((sealed.cache_id for sealed in self.seals.values()), None)
        return next((sealed.ledger[key] for sealed in self.seals.values() if key in sealed.ledger), None)

    def sources_of(self, extension: int) -> Sequence[SourceIdentity] | None:
        """The sources that an extension added, if seals before and after it are whole."""
        counts = {sealed.num_extensions: sealed.added_sources for sealed in self.seals.values()} | {0: ()}
        if extension not in counts or extension - 1 not in counts:
            return None
        return counts[extension][len(counts[extension - 1]) :]


def mend_plan(recipe: CacheRecipe, objects: Objects, known: Known) -> list[str]:
    """Make plan, extensions, unit plans and tokenizer files whole; the keys that were not."""
    recipe = settled(recipe)
    mended = []
    if whole_document(objects, PLAN) is None:
        sources = None if known.manifest is None else known.manifest.sources
        with attempt_folder(objects, "plan") as (attempt, prefix):
            body = plan_body(recipe, objects, prefix, sources)
            _replace(objects, PLAN, body, attempt, known.digest_of(PLAN), recipe)
        objects.delete_tree(prefix)
        mended.append(PLAN)
    base = Plan(read_document(objects, PLAN))
    mended += _mend_tokenizer(recipe, objects, base)
    listed = [int(key.rsplit("/", 1)[1].split(".")[0]) for key in objects.list(EXTENSIONS)]
    extensions: tuple[Document, ...] = ()
    for number in range(1, 1 + max([*listed, *(s.num_extensions for s in known.seals.values())], default=0)):
        before = Plan(base.document, extensions)
        document = whole_document(objects, extension_key(number))
        if document is None:
            mended.append(extension_key(number))
            if not _mend_extension(recipe, objects, before, known, number):
                _forget_extension(objects, before, number)
                break
            document = read_document(objects, extension_key(number))
        extensions = (*extensions, document)
    return mended + _mend_unit_plans(recipe, objects, Plan(base.document, extensions))


def _replace(objects: Objects, key: str, body: dict[str, object], attempt: str, expected: str | None, recipe: CacheRecipe) -> None:
    if expected is not None and digest(body) != expected:
        raise other_texts(expected, digest(body), recipe)
    replace_document(objects, key, body, attempt)


def _mend_extension(recipe: CacheRecipe, objects: Objects, before: Plan, known: Known, number: int) -> bool:
    """False where no seal says what the extension held: then nothing that was sealed stands on it."""
    sources = known.sources_of(number)
    if sources is None:
        if known.digest_of(extension_key(number)) is not None:
            raise CorruptError("an extension and the seals beside it are damaged", where=extension_key(number))
        return False
    with attempt_folder(objects, "plan") as (attempt, prefix):
        body = extension_body(recipe, objects, prefix, before, tallies_of(recipe, before, sources))
        _replace(objects, extension_key(number), body, attempt, known.digest_of(extension_key(number)), recipe)
    objects.delete_tree(prefix)
    return True


def _forget_extension(objects: Objects, before: Plan, number: int) -> None:
    """Remove a damaged extension that was never sealed, with its units' records: `extend` makes it again from the texts."""
    for unit, revision in list(listed_records(objects)):
        if unit >= before.num_units:
            objects.delete(unit_key(unit, revision))
    objects.delete(extension_key(number))


def _mend_tokenizer(recipe: CacheRecipe, objects: Objects, planned: Plan) -> list[str]:
    wanted: dict[str, str] = planned.document.body["tokenizer"]["files"]
    broken = [name for name, content in wanted.items() if not _is_whole(objects, tokenizer_key(name), content)]
    if broken:
        if recipe.base is None:
            load_plan_tokenizer(recipe, planned.document.body["tokenizer"]["digest"])
            own = tokenizer_files(load_recipe_tokenizer(recipe))
        else:
            own = {name: objects_at(recipe.base).read(tokenizer_key(name)) for name in broken}
        for name in broken:
            if name not in own or sha256(own[name]) != wanted[name]:
                raise MismatchError(
                    "a tokenizer file comes out otherwise here",
                    expected=wanted[name],
                    where=tokenizer_key(name),
                    remedy="Repair with the version of transformers that planned the cache.",
                )
            objects.put(tokenizer_key(name), own[name])
    return [tokenizer_key(name) for name in broken]


def _mend_unit_plans(recipe: CacheRecipe, objects: Objects, planned: Plan) -> list[str]:
    """Plan again each generation that has a damaged unit plan; its units land on their keys."""
    mended: list[str] = []
    first = 0
    for number, document in enumerate((planned.document, *planned.extensions)):
        keys = {plan_unit_key(first + n, unit["digest"]): unit["digest"] for n, unit in enumerate(document.body["units"])}
        broken = [key for key, content in keys.items() if not _is_whole(objects, key, content)]
        first += len(keys)
        if not broken:
            continue
        sources = [SourceIdentity.model_validate(source) for source in document.body["sources"]]
        with attempt_folder(objects, "plan") as (_, prefix):
            if number == 0:
                plan_body(recipe, objects, prefix, sources)
            else:
                before = planned.at_generation(number - 1)
                extension_body(recipe, objects, prefix, before, tallies_of(recipe, before, sources))
        objects.delete_tree(prefix)
        left = [key for key in broken if not _is_whole(objects, key, keys[key])]
        if left:
            raise other_texts(keys[left[0]], "others", recipe)
        mended += broken
    return mended


def _is_whole(objects: Objects, key: str, content: str) -> bool:
    try:
        return sha256(objects.read(key)) == content
    except NotFoundError:
        return False


def mend_calibration(recipe: CacheRecipe, objects: Objects, known: Known) -> list[str]:
    """Make calibration, its two copies of the matrices, and manifest whole; the keys that were not."""
    recipe, _ = with_dtype(settled(recipe), objects)
    planned = read_plan(objects).at_generation(0)  # what it was calibrated on
    mended = []
    document = whole_document(objects, CALIBRATION)
    data = None if document is None else _matrices(objects, document.body["arrays_digest"])
    if document is None or data is None:
        teacher = load_recipe_teacher(recipe, planned.vocab_size)
        body, data = calibration_body(recipe, planned, teacher, objects)
        expected = known.digest_of(CALIBRATION) if document is None else document.digest
        arrays = body["arrays_digest"] if known.manifest is None else known.manifest.calibration.digest
        if (expected is not None and digest(body) != expected) or body["arrays_digest"] != arrays:
            raise MismatchError(
                "the calibration comes out otherwise here",
                expected=expected or arrays,
                found=digest(body),
                where=CALIBRATION,
                remedy="Repair on the kind of machine, and with the recipe and teacher, that made it.",
            )
        if document is None:
            mended.append(CALIBRATION)
            replace_document(objects, CALIBRATION, body, new_attempt())
    for key in calibration_keys(sha256(data)):
        if not _is_whole(objects, key, sha256(data)):
            mended.append(key)
            objects.put(key, data)
    if whole_document(objects, MANIFEST) is None:
        manifest = manifest_of(recipe, planned, read_document(objects, CALIBRATION).body)
        _replace(objects, MANIFEST, manifest.body, new_attempt(), known.digest_of(MANIFEST), recipe)
        mended.append(MANIFEST)
    return mended


def _matrices(objects: Objects, content: str) -> bytes | None:
    try:
        return save(read_calibration_arrays(objects, content))
    except CorruptError:
        return None


def mend_seals(objects: Objects, manifest: Manifest, records: Sequence[UnitRecord], known: Known) -> list[str]:
    """Make the seals of older generations, and a damaged newest one, again; the keys that were not whole."""
    planned = read_plan(objects)
    numbers = listed_seals(objects)
    mended: list[str] = []
    for number in range(numbers[-1] + 1 if numbers else 0):
        if number in known.seals:
            continue
        following = None if number == numbers[-1] else whole_document(objects, seal_key(number + 1))
        if number != numbers[-1] and following is None:
            raise CorruptError("two seals in a row are damaged", where=seal_key(number))
        least = known.seals[number - 1].num_extensions if number - 1 in known.seals else 0
        most = known.seals[number + 1].num_extensions if number + 1 in known.seals else len(planned.extensions)
        for extensions in range(most, least - 1, -1):
            at_generation = planned.at_generation(extensions)
            if at_generation.num_units > len(records):
                continue
            draft = draft_generation(objects, at_generation, manifest, records[: at_generation.num_units], number)
            if following is None or following.body["parent"] == digest(draft.body):
                for key in draft.staged:
                    objects.publish(f"{draft.prefix}/{key}", key)
                if number == numbers[-1]:
                    write_metadata(objects, draft.metadata)
                replace_document(objects, seal_key(number), draft.body, new_attempt())
                objects.delete_tree(draft.prefix)
                known.seals[number] = Seal.from_body(draft.body)
                mended.append(seal_key(number))
                break
            objects.delete_tree(draft.prefix)
        else:
            raise CorruptError(
                "a seal cannot be made again from the units as they are now", where=seal_key(number), remedy="Restore this object."
            )
    return mended
