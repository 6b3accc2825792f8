"""seal: publish what is filled, and make a generation of it that any zarr reader can read."""

from typing import TYPE_CHECKING

from teacher_cache.options import AsJson, CacheAddress, say

if TYPE_CHECKING:
    from signal_store.ledger.seal import Seal


def seal(uri: str) -> "Seal":
    """Seal the cache at an address; IncompleteError, with the numbers of the missing units, if some are not filled."""
    from signal_store.io.objects import objects_at
    from teacher_cache.builder.seal import seal_cache

    return seal_cache(objects_at(uri))


def command(cache: CacheAddress, as_json: AsJson = False) -> None:
    """Publish, pack the records, write metadata and the seal."""
    made = seal(cache)
    say({"cache_id": made.cache_id, "generation": made.generation, "content": made.content_digest}, as_json)
