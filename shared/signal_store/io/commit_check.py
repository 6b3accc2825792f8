"""Whether a place can hold a cache: each operation of a commit, tried on objects of its own that are gone afterwards."""

from signal_store.errors import StorageError
from signal_store.io.objects import Objects
from signal_store.ledger.documents import new_attempt, staging_prefix


def commit_faults(objects: Objects) -> list[StorageError]:
    """What the place refuses of what a commit needs, each kind once; empty where all works. Other errors are raised."""
    prefix = staging_prefix("probe", new_attempt())
    found: dict[str, StorageError] = {}
    try:
        for step in (_creates_once, _puts, _publishes):
            try:
                step(objects, prefix)
            except StorageError as error:
                found.setdefault(error.what, error)
    finally:
        objects.delete_tree(prefix)
    return list(found.values())


def refuse_uncommittable(objects: Objects) -> None:
    """StorageError for the first fault, before any work is done."""
    for fault in commit_faults(objects):
        raise fault


def _creates_once(objects: Objects, prefix: str) -> None:
    key = f"{prefix}/once"
    won = objects.create(key, b"1"), objects.create(key, b"2")
    if won != (True, False) or objects.read(key) != b"1":
        raise StorageError(
            "the place creates an object twice, which must happen once",
            expected="the first to stand",
            found=f"first {won[0]}, second {won[1]}",
            where=objects.uri,
            remedy="Fill on another file system, or in a bucket that has conditional puts.",
        )


def _puts(objects: Objects, prefix: str) -> None:
    for data in (b"1", b"2"):
        objects.put(f"{prefix}/put", data)
    _holds(objects, f"{prefix}/put", b"2")


def _publishes(objects: Objects, prefix: str) -> None:
    with objects.stream(f"{prefix}/staged") as file:
        file.write(b"1")
    objects.publish(f"{prefix}/staged", f"{prefix}/published")
    _holds(objects, f"{prefix}/published", b"1")


def _holds(objects: Objects, key: str, data: bytes) -> None:
    if (found := objects.read(key)) != data:
        raise StorageError("the place does not give back what was put there", expected=data, found=found[:20], where=objects.uri)
