"""A cache and its segments as people look at them: text, decoded signals, search, pages of a notebook.

The classes are those of `signal_store`, and decode on top. What decodes needs the extra `inspect`; each method raises
MismatchError where the cache does not hold what it is asked for. Row t predicts token t + 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self, overload

from signal_store.cache import Cache
from signal_store.io.disk_cache import DiskCacheOptions
from signal_store.manifest import Split
from signal_store.segment import Segment
from signal_view import coloured, lazy, search, segment_tree, summary
from signal_view.segment_text import SegmentText
from signal_view.signals import attention, coverage, distribution, evidence, hidden, tags


class SegmentView(SegmentText):
    """A segment whose text and signals can be read."""

    __slots__ = ()

    def top(self, n: int = 10, temperature: float = 1.0, tokens: slice = slice(None)) -> Any:
        """pandas DataFrame of each row's n likeliest tokens, indexed by (token, rank): piece, id, probability, nats, is_next;
        `tokens`: of these places only."""
        return distribution.top(self, n, temperature, tokens)

    def logprobs(self, temperature: float = 1.0) -> Any:
        """xarray DataArray [token, vocabulary] float32: the teacher's log-probabilities in nats, at a cached temperature."""
        return distribution.logprobs(self, temperature)

    def scalars(self) -> Any:
        """xarray Dataset over `token`: entropy, log-probability of the favourite and of the next token (nats, T = 1), head
        masses."""
        return distribution.scalars(self)

    def hidden(self, tap: str, layer: int) -> Any:
        """xarray DataArray [token, channel] float32 of a cached tap of a layer (1 is the first block), at the sampled places."""
        return hidden.hidden(self, tap, layer)

    def attention(self, layer: int) -> Any:
        """xarray DataArray [token, head, key] float32: probabilities of keyword rows; NaN where nothing is stored."""
        return attention.attention(self, layer)

    def evidence(self) -> Any:
        """pandas DataFrame: a question's sentences, and their shares of the answer's attention by layer."""
        return evidence.evidence(self)

    def coverage(self) -> Any:
        """pandas DataFrame: a text's key words, and the probability that its summary says each."""
        return coverage.coverage(self)

    def roles(self) -> Any:
        """pandas DataFrame: what part each token's word plays."""
        return tags.roles(self)

    def to_xarray(self) -> Any:
        """xarray DataTree of what the cache holds of it, decoded; not the dense distribution (`logprobs`), drawn ids, gradients."""
        return segment_tree.to_xarray(self)

    def _repr_html_(self) -> str:
        return coloured.segment_html(self)


class CacheView(Cache):
    """A sealed cache, alone or with overlays, whose segments are `SegmentView`s."""

    @classmethod
    def of(cls, cache: Cache) -> Self:
        """The same cache, at the same generation."""
        return cls(cache.parts)

    @overload
    def __getitem__(self, index: int) -> SegmentView: ...
    @overload
    def __getitem__(self, index: slice) -> list[SegmentView]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """One segment, or those of a slice."""
        found = super().__getitem__(index)
        return [self._view(segment) for segment in found] if not isinstance(found, Segment) else self._view(found)

    def _view(self, segment: Segment) -> SegmentView:
        return SegmentView(cache=self, **{field.name: getattr(segment, field.name) for field in fields(segment)})

    def __iter__(self) -> Iterator[SegmentView]:
        return (self[index] for index in range(len(self)))

    def search(self, pattern: str, *, split: Split | None = None, limit: int | None = None) -> Iterator[search.Match[SegmentView]]:
        """Places whose text matches a regular expression, segment after segment; InputError if it is none."""
        return search.search(self, self.__getitem__, pattern, split=split, limit=limit)

    def sample(self, seed: int = 0, *, split: Split | None = None) -> SegmentView:
        """A segment drawn evenly among all, or those of a split; the same seed draws the same."""
        return self[search.sample(self, seed, split=split)]

    def to_xarray(self) -> Any:
        """xarray DataTree of the whole cache, decoded where it is looked at (extra `inspect`); nothing is read before."""
        return lazy.to_xarray(self)

    def _repr_html_(self) -> str:
        return summary.html_of(summary.summarise(self))


def open_cache(
    uri: str | Path | Sequence[str | Path], *, generation: int | None = None, disk_cache: DiskCacheOptions | None = None
) -> CacheView:
    """Open a cache to look at it: `signal_store.open_cache`, but what it gives decodes."""
    return CacheView.open(uri, generation=generation, disk_cache=disk_cache)
