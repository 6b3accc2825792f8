"""What `inspect --segment` and `--token` say: a segment's text under the teacher's surprise, and what it expected at one token."""

import math
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from signal_store.errors import InputError
from signal_view import CacheView, SegmentView
from signal_view.coloured import surprise_and_entropy
from signal_view.segment_rows import place_among
from signal_view.summary import printable

TOP = 10


def segment_of(cache: CacheView, number: int) -> SegmentView:
    """InputError where there is none of this number."""
    if not -len(cache) <= number < len(cache):
        raise InputError("no such segment", expected=f"0 to {len(cache) - 1}", found=number, where=cache.uri)
    return cache[number]


def segment_facts(segment: SegmentView) -> dict[str, Any]:
    """As JSON: where it is from, its tokens, and by token surprise and entropy in nats where the cache holds them."""
    facts: dict[str, Any] = {
        "segment": segment.index,
        "source": segment.source,
        "split": segment.split,
        "document": segment.document,
        "context_only": segment.context_only,
        "finished": segment.finished,
        "text": segment.text,
        "tokens": segment.tokens,
        "input_ids": segment.input_ids.tolist(),
    }
    if segment.cache.manifest.signals.distribution is not None:
        for name, values in zip(("surprise", "entropy"), surprise_and_entropy(segment), strict=True):
            facts[name] = [None if value != value else round(value, 4) for value in values.tolist()]
    return facts


def segment_text(segment: SegmentView) -> Group:
    """For a terminal: the text, redder where the teacher was surprised."""
    text = Text()
    surprise = np.full(len(segment), np.nan, np.float32)
    if segment.cache.manifest.signals.distribution is not None:
        surprise, _ = surprise_and_entropy(segment)
    largest = (float(np.nanmax(surprise)) if np.isfinite(surprise).any() else 0.0) or 1.0
    for piece, value in zip(segment.tokens, surprise.tolist(), strict=True):
        fade = 255 if value != value else 255 - round(160 * min(1.0, value / largest))
        text.append(printable(piece), style=None if value != value else f"black on rgb(255,{fade},{fade})")
    return Group(Text(repr(segment)), text)


def token_facts(segment: SegmentView, token: int) -> dict[str, Any]:
    """What the teacher expected after a token: by cached temperature the likeliest, and entropy and next token where they are
    known."""
    place_among(segment, token)
    signal = segment.cache.manifest.signals.distribution
    facts: dict[str, Any] = {"segment": segment.index, "token": token, "piece": segment.tokens[token]}
    pieces = [*segment.tokens, segment.next_piece]
    facts["next_piece"] = pieces[token + 1]
    if signal is None:
        return facts
    rows = segment.scalars().sel(token=token)
    next_logprob = float(rows.label_logprob)
    facts |= {"entropy": float(rows.entropy), "next_logprob": None if math.isnan(next_logprob) else next_logprob}
    has_tail = segment.cache.manifest.calibration.tail_rank > 0
    n = TOP if has_tail else min(TOP, signal.head_size)
    facts["top"] = {
        f"{t:g}": segment.top(n, t, slice(token, token + 1))
        .loc[token][["piece", "id", "probability", "is_next"]]
        .to_dict("records")
        for t in signal.temperatures
    }
    return facts


def token_table(facts: dict[str, Any]) -> Group:
    """For a terminal: a column for each temperature."""
    follows = "what comes is not stored" if facts["next_piece"] is None else f"comes {facts['next_piece']!r}"
    line = f"after token {facts['token']} {facts['piece']!r} {follows}"
    if "top" not in facts:
        return Group(Text(line))
    table = Table("rank", *(f"T = {temperature}" for temperature in facts["top"]))
    for rank, row in enumerate(zip(*facts["top"].values(), strict=True), start=1):
        cells = [Text(f"{c['probability']:.4f} {c['piece']!r}", style="bold red" if c["is_next"] else "") for c in row]
        table.add_row(str(rank), *cells)
    known = "" if facts["next_logprob"] is None else f", log p(next) {facts['next_logprob']:.3f}"
    numbers = f"entropy {facts['entropy']:.3f} nats{known}"
    return Group(Text(f"{line}: {numbers}"), table)
