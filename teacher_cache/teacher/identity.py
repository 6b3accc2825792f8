"""Whether a teacher is the one that a cache, or the base of an overlay, was made with: by its digests, not by where it lies."""

from signal_store.cache import open_cache
from signal_store.errors import MismatchError
from signal_store.format.section import Section
from signal_store.manifest import TeacherIdentity
from teacher_cache.recipe import CacheRecipe


def differing_fields(one: Section, other: Section) -> list[str]:
    """Names of the fields that two sections of one kind, as this version reads them, do not share."""
    return [name for name in type(one).model_fields if getattr(one, name) != getattr(other, name)]


def refuse_another_than_the_base(base: str, found: TeacherIdentity) -> None:
    """MismatchError where an overlay's teacher is not its base's. `open_cache` would refuse the two, but only when all is done."""
    made = open_cache(base).manifest.teacher
    if made.weights_digest != found.weights_digest:
        raise MismatchError(
            "the overlay's teacher is not its base's",
            expected=f"{made.name} in {made.dtype}, {made.weights_digest}",
            found=f"{found.name} in {found.dtype}, {found.weights_digest}",
            where=base,
            remedy="Give the teacher and the dtype that the base was made with.",
        )


def refuse_another_teacher(made: TeacherIdentity, found: TeacherIdentity, recipe: CacheRecipe) -> None:
    """MismatchError naming what differs, where a cache was `made` by another teacher than the one that was `found`."""
    names = [name for name in differing_fields(made, found) if name not in {"name", "revision"}]
    if names:
        raise MismatchError(
            f"another teacher ({', '.join(names)} differ)",
            expected={n: getattr(made, n) for n in names},
            found={n: getattr(found, n) for n in names},
            where=recipe.teacher.model,
            remedy="Restore the teacher that began this cache, or build into another folder.",
        )
