"""The page that `inspect --html` writes: a sealed cache with its plots and samples, or how far an unfinished one is."""

import time
from collections.abc import Iterator

import numpy as np

from signal_store.io.objects import objects_at
from signal_view import CacheView, SegmentView, open_cache
from signal_view.coloured import segment_html
from signal_view.page import Block, page, picture, progress, searchable, table
from signal_view.plots import plot_attention, plot_explained_variance, plot_surprise, plot_tail_spectrum, plot_top
from signal_view.summary import Section, summarise
from teacher_cache.builder.status import COLUMNS, Status, find_status, line_of, worker_rows

SAMPLES = 60
BEGINNING = 60
"""Characters of a sample that are shown before it is opened."""
LOOKED_FOR_KEYWORDS = 40
UNITS_SHOWN = 4096


def inspect_page(addresses: list[str]) -> str:
    """HTML of the cache at an address, with its overlays; or, where one of them is being filled, of its progress."""
    for address in addresses:
        found = find_status(objects_at(address))
        if found is not None and found.generation is None:
            return page(f"{address} (not sealed)", list(_progress(found)))
    cache = open_cache(addresses)
    return page(cache.uri, [*_facts(cache), *_pictures(cache), _samples(cache)])


def _facts(cache: CacheView) -> Iterator[Block]:
    for section in summarise(cache).sections:
        body = table(section)
        yield Block(section.title, body if len(section.rows) < 12 else f"<details><summary>show</summary>{body}</details>")


def _spread(cache: CacheView, count: int) -> list[SegmentView]:
    numbers = np.unique(np.linspace(0, len(cache) - 1, min(count, len(cache))).round().astype(int))
    return [cache[int(number)] for number in numbers]


def _pictures(cache: CacheView) -> Iterator[Block]:
    signals = cache.manifest.signals
    if signals.distribution is not None:
        shown = _spread(cache, 5)[1:4] or _spread(cache, 1)
        n = min(8, signals.distribution.head_size or 8)
        parts = []
        for segment in shown:
            begin = segment.context_only + (len(segment) - segment.context_only) // 3
            says = f"segment {segment.index} of {segment.source}, from token {begin}"
            parts += [picture(plot_top(segment, n, first=begin), says), picture(plot_surprise(segment, first=begin), says)]
        yield Block("what the teacher expects", "".join(parts))
        if cache.manifest.calibration.tail_rank:
            yield Block("tail", picture(plot_tail_spectrum(cache), "how much each direction of the tail moves the logits"))
    if cache.manifest.calibration.hidden:
        yield Block("hidden states", picture(plot_explained_variance(cache), "what the stored directions keep of the variance"))
    if cache.manifest.calibration.attention:
        yield Block("attention", _attention(cache))


def _attention(cache: CacheView) -> str:
    """The first keywords that are met, one a segment."""
    layer = cache.manifest.calibration.attention[-1].layer
    parts = []
    for segment in _spread(cache, LOOKED_FOR_KEYWORDS):
        if segment.attention(layer).keyword.values.any():
            parts.append(picture(plot_attention(segment, layer), f"segment {segment.index} of {segment.source}"))
        if len(parts) == 2:
            break
    return "".join(parts) or '<p class="note">none of the segments that were looked at has a keyword</p>'


def _samples(cache: CacheView) -> Block:
    samples = [
        (f"{s.index}: {s.source}, {len(s)} tokens, {s.split}: {_beginning(s)}", segment_html(s)) for s in _spread(cache, SAMPLES)
    ]
    says = f'<p class="note">{len(samples)} of {len(cache):,} segments, spread evenly; colour is the teacher\'s surprise.</p>'
    return Block("samples", says + searchable("samples", samples))


def _beginning(segment: SegmentView) -> str:
    text = " ".join(segment.text[:200].split())
    return text if len(text) <= BEGINNING else text[: BEGINNING - 1] + "…"


def _progress(found: Status) -> Iterator[Block]:
    as_of = time.strftime("as of %Y-%m-%d %H:%M:%S UTC", time.gmtime(found.now))
    bar = progress(found.done_tokens, sum(found.unit_tokens), f"{line_of(found)}  ({as_of})")
    yield Block("progress", bar + _unit_map(found))
    if found.workers:
        yield Block("workers", table(Section.of("workers", COLUMNS, list(worker_rows(found)))))


def _unit_map(found: Status) -> str:
    """A square for each unit: dark where it has a record."""
    cells = "".join("■" if done else "□" for done in found.done[:UNITS_SHOWN])
    more = f", and {len(found.done) - UNITS_SHOWN:,} more" if len(found.done) > UNITS_SHOWN else ""
    return f'<pre aria-label="units">{cells}</pre><p class="note">a square for each unit, ■ where it is done{more}</p>'
