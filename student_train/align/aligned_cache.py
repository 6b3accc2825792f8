"""A cache as a student with another tokenizer sees it, beside its view; and what any cache says of the student's side."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import vocabulary_size
from signal_store.cache import Cache
from signal_store.io.disk_cache import DiskCacheOptions
from signal_store.io.objects import objects_at
from signal_store.sealed_part import SealedPart
from student_train.align.spelling import spellings
from student_train.align.tokenizers import cached_tokenizer
from student_train.align.view import View
from student_train.align.vocabularies import Vocabularies


class AlignedCache(Cache):
    """The cache that a `View` is of, and the view."""

    def __init__(self, parts: Sequence[SealedPart], view: View) -> None:
        """MismatchError where the view is of another cache."""
        super().__init__(parts)
        view.refuse_another(self)
        self.view = view

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it anew, at the same generation."""
        return _reopened, ([(part.uri, part.seal.generation, part.disk_cache) for part in self.parts], self.view)

    @cached_property
    def vocabularies(self) -> Vocabularies:
        """Of the teacher and the student; its `rows` are those that the tokenizer has."""
        teacher, student = spellings(cached_tokenizer(self), self.view.tokenizer)
        return Vocabularies(teacher, student, len(student.symbols))


def _reopened(parts: list[tuple[str, int, DiskCacheOptions | None]], view: View) -> AlignedCache:
    return AlignedCache([SealedPart(objects_at(uri), generation, disk_cache) for uri, generation, disk_cache in parts], view)


def longest_segment(cache: Cache) -> int:
    """Tokens of the student's that a segment may have."""
    return cache.view.longest if isinstance(cache, AlignedCache) else cache.manifest.plan.context


def student_tokens(cache: Cache, tokens: int) -> int:
    """So many of the cache's tokens in the student's, by the ratio of all that the view tells."""
    if not isinstance(cache, AlignedCache):
        return tokens
    theirs = sum(int(cache.segment_columns(unit, "length")["length"].sum()) for unit in range(len(cache.view.units)))
    return round(tokens * cache.view.rows["tokens"] / theirs)


def segment_lengths(cache: Cache, numbers: Iterable[int]) -> list[int]:
    """Tokens of the student's that these segments have."""
    if not isinstance(cache, AlignedCache):
        return [len(cache[number]) for number in numbers]
    places = [cache.place_of(number) for number in numbers]
    units = {unit: cache.view.unit(unit).length for unit in dict(places)}
    return [int(units[unit][place]) for unit, place in places]


def student_tokenizer(cache: Cache) -> PreTrainedTokenizerFast:
    """What a student of this cache reads with."""
    return cache.view.tokenizer if isinstance(cache, AlignedCache) else cached_tokenizer(cache)


def student_tokenizer_digest(cache: Cache) -> str:
    """Of the same."""
    return str(cache.view.about["student_tokenizer"]) if isinstance(cache, AlignedCache) else cache.manifest.tokenizer.digest


def student_vocabulary(cache: Cache) -> int:
    """Ids that its text may hold: from 0, so many."""
    return vocabulary_size(cache.view.tokenizer) if isinstance(cache, AlignedCache) else cache.manifest.tokenizer.vocab_size
