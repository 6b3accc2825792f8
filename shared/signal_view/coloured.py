"""Coloured tokens as HTML: how unsure the teacher was, how surprised, how heavy a token weighs. All text is escaped, and stays
in a block of its own, so that right-to-left text reads as it should and reorders nothing else.
"""

import html
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from signal_store.signals.distribution import SCALARS
from signal_view.segment_text import SegmentText

MOST_TOKENS = 2048
"""Of a segment, that a page shows."""
STYLE = "white-space:pre-wrap;font-family:monospace;line-height:1.7;unicode-bidi:plaintext"


def tokens_html(pieces: Sequence[str], values: NDArray[np.float32], says: Sequence[str], largest: float) -> str:
    """Each piece on a background from white (0) to red (`largest`), its words in `says` shown on hover; NaN has none."""
    spans = []
    for piece, value, words in zip(pieces, values.tolist(), says, strict=True):
        share = 0.0 if not largest or value != value else min(1.0, max(0.0, value / largest))
        colour = f"rgb(255,{255 - round(155 * share)},{255 - round(175 * share)})"
        shown = html.escape(piece).replace("\n", "↵\n").replace("\t", "⇥\t")
        spans.append(f"<span style='background:{colour}' title='{html.escape(words, quote=True)}'>{shown}</span>")
    return f"<pre dir='auto' style='{STYLE}'>{''.join(spans)}</pre>"


def surprise_html(segment: SegmentText, of: str = "surprise") -> str:
    """The text under the teacher's surprise (−log p of each token) or its `entropy` before each token, in nats."""
    pieces = segment.tokens[:MOST_TOKENS]
    surprise, entropy = surprise_and_entropy(segment)
    values = (surprise if of == "surprise" else entropy)[: len(pieces)]
    says = [
        f"{place}: not predicted" if s != s and e != e else f"{place}: surprise {s:.2f}, entropy {e:.2f} nats"
        for place, (s, e) in enumerate(zip(surprise[: len(pieces)], entropy[: len(pieces)], strict=True))
    ]
    largest = float(np.nanquantile(values, 0.98)) if np.isfinite(values).any() else 0.0
    return tokens_html(pieces, values, says, largest) + _more(segment)


def _more(segment: SegmentText) -> str:
    return f"<p>and {len(segment) - MOST_TOKENS:,} more tokens</p>" if len(segment) > MOST_TOKENS else ""


def surprise_and_entropy(segment: SegmentText) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """float32 [n] each, in nats, of the row that predicts each token: NaN where none does."""
    start = segment.token_start + segment.context_only
    rows = segment.cache.read("distribution/scalars", start, segment.token_start + len(segment)).astype(np.float32)
    found = np.full((2, len(segment)), np.nan, np.float32)
    found[0, segment.context_only + 1 :] = -rows[:-1, SCALARS.index("label_logprob")]
    found[1, segment.context_only + 1 :] = rows[:-1, SCALARS.index("entropy")]
    return found[0], found[1]


def segment_html(segment: SegmentText) -> str:
    """A segment at a glance: where it is from, and its text, under the teacher's surprise where the cache holds it."""
    facts = f"segment {segment.index}: {segment.source}, document {segment.document}, {len(segment):,} tokens, {segment.split}"
    if segment.cache.manifest.signals.distribution is not None:
        body = surprise_html(segment)
    else:
        body = f"<pre dir='auto' style='{STYLE}'>{html.escape(''.join(segment.tokens[:MOST_TOKENS]))}</pre>" + _more(segment)
    return f"<div class='teacher-cache'><code>{html.escape(facts)}</code>{body}</div>"
