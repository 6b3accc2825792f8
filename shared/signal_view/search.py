"""Find segments by their text, or draw one."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError
from signal_store.manifest import Split
from signal_store.segment import Segment
from signal_view.tokens import token_texts

SegmentT = TypeVar("SegmentT", bound=Segment)


@dataclass(frozen=True, slots=True, eq=False)
class Match(Generic[SegmentT]):
    """A place in a segment whose text matches: characters [start, stop) of its text, tokens first to last, both included, that hold
    them."""

    segment: SegmentT
    text: str
    start: int
    stop: int
    first: int
    last: int


def search(
    cache: Cache, segment_of: Callable[[int], SegmentT], pattern: str, *, split: Split | None, limit: int | None
) -> Iterator[Match[SegmentT]]:
    """Matches in the order of segments, each with what `segment_of` makes of its number, at most `limit`; empty ones are none."""
    if limit is not None and limit < 0:
        raise InputError("limit is below 0", expected="how many matches at most", found=limit, where="search")
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise InputError("not a regular expression", found=f"{pattern} ({error})", where="search") from error
    return _matches(cache, segment_of, wanted, split, limit)


def _matches(
    cache: Cache, segment_of: Callable[[int], SegmentT], wanted: "re.Pattern[str]", split: Split | None, limit: int | None
) -> Iterator[Match[SegmentT]]:
    found = 0
    for segment in map(segment_of, _segments_with(cache, wanted, split)):
        pieces = token_texts(cache).pieces(segment.input_ids.tolist())
        ends = np.cumsum([len(piece) for piece in pieces])
        for match in wanted.finditer("".join(pieces)):
            if match.end() == match.start():
                continue
            if limit is not None and found >= limit:
                return
            found += 1
            first, last = (int(place) for place in np.searchsorted(ends, (match.start(), match.end() - 1), side="right"))
            while first and not pieces[first - 1]:
                first -= 1  # the character's other tokens
            yield Match(segment, match[0], match.start(), match.end(), first, last)


def _segments_with(cache: Cache, wanted: "re.Pattern[str]", split: Split | None) -> Iterator[int]:
    """Numbers of the segments whose text matches somewhere; units are read whole, and text alone is decoded."""
    texts, path = token_texts(cache), "tokens/input_ids"
    for unit in range(cache.seal.num_units) if split is None else cache.units(split).tolist():
        columns = cache.segment_columns(unit, "token_start", "length")
        first_row = unit * cache.capacity_rows[path]
        ids = cache.read_unit(unit, {path: cache.capacity_rows[path]})[path]
        for place, (start, length) in enumerate(zip(columns["token_start"], columns["length"].astype(np.int64), strict=True)):
            if wanted.search(texts.decode(ids[start - first_row : start - first_row + length].tolist())):
                yield cache.first_segment(unit) + place


def sample(cache: Cache, seed: int, *, split: Split | None) -> int:
    """Number of a segment, evenly among those of a split or all; MismatchError where there is none."""
    if not isinstance(seed, int) or seed < 0:
        raise InputError("not a seed", expected="a number from 0", found=seed, where="sample")
    numbers = _numbers(cache, split)
    if not len(numbers):
        raise MismatchError(f"the cache has no {split} split", expected=f"a source with split: {split}", where=cache.uri)
    return int(numbers[np.random.default_rng(seed).integers(len(numbers))])


def _numbers(cache: Cache, split: Split | None) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    if split is None:
        return np.arange(len(cache))
    ranges = [np.arange(cache.first_segment(int(u)), cache.first_segment(int(u) + 1)) for u in cache.units(split)]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
