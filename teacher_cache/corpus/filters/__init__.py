"""What of a source's documents is worth a teacher's time. One file a filter; `filters_of` says which a source has."""

from teacher_cache.corpus.filters.base import DocumentFilter
from teacher_cache.corpus.filters.fits_context import FitsContext
from teacher_cache.recipe import CacheRecipe, Source


def filters_of(source: Source, recipe: CacheRecipe) -> tuple[DocumentFilter, ...]:
    """The filters of a source, cheap ones before dear ones."""
    return (FitsContext(recipe.context, refuse_long=source.long_chats == "refuse"),)


__all__ = ["DocumentFilter", "filters_of"]
