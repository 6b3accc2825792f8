"""Plots of a cache. Each takes the matplotlib Axes to draw on, or makes one, and returns it.

Text on a plot is shown as it is where an installed font has it, and as its code point where none has.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.codecs.zigzag import from_zigzag
from signal_store.errors import InputError, MismatchError
from signal_view.extras import pyplot
from signal_view.segment_rows import place_among

if TYPE_CHECKING:
    from signal_view.views import SegmentView

OTHER_FONTS = ("CJK", "WenQuanYi", "Noto Sans SC", "Source Han", "SimHei", "YaHei", "PingFang", "Arial Unicode", "Unifont")
MOST_ROWS = 65_536
"""Of a signal, that a spectrum is measured on."""


@lru_cache(maxsize=1)
def fonts() -> tuple[tuple[str, ...], Any]:
    """(families that text is drawn with, a function that says whether one of them has a character)."""
    from matplotlib import font_manager, ft2font

    entries = [e for e in font_manager.fontManager.ttflist if any(name in e.name for name in OTHER_FONTS)]
    names = tuple(dict.fromkeys(("DejaVu Sans", *(entry.name for entry in entries[:4]))))
    faces = [ft2font.FT2Font(font_manager.findfont(name)) for name in names]
    return names, lru_cache(maxsize=65_536)(lambda character: any(face.get_char_index(ord(character)) for face in faces))


def shown(piece: str, most: int = 14) -> str:
    """A piece of text as a label: whitespace visible, cut to `most` characters, nothing that matplotlib would read as a formula."""
    _, has = fonts()
    marks = {"\n": "↵", "\t": "⇥", " ": "·", "$": r"\$"}
    cut = piece if len(piece) <= most else piece[: most - 1] + "…"
    return "".join(marks.get(c) or (c if c.isprintable() and has(c) else f"U+{ord(c):04X}") for c in cut)


def axes_of(axes: Any, size: tuple[float, float]) -> Any:
    """The given Axes, or those of a new figure of a size in inches."""
    return axes if axes is not None else pyplot().subplots(figsize=size, layout="constrained")[1]


def _some(count: int, what: str) -> int:
    if count < 1:
        raise InputError("nothing would be drawn", expected=f"{what} of at least 1", found=count, where="plot")
    return count


def label_tokens(axes: Any, pieces: Sequence[str], **style: Any) -> None:
    """Pieces of text along the x axis."""
    axes.set_xticks(range(len(pieces)), [shown(piece, 10) for piece in pieces], **{"rotation": 90, "fontsize": 7, **style})
    _in_fonts(axes.get_xticklabels())


def _in_fonts(labels: Sequence[Any]) -> None:
    for label in labels:
        label.set_fontfamily(list(fonts()[0]))


def plot_top(
    segment: "SegmentView", n: int = 8, temperature: float = 1.0, first: int | None = None, tokens: int = 16, axes: Any = None
) -> Any:
    """The teacher's n likeliest tokens along a sentence: a column for each row from `first` on (the segment's own first one if
    None), headed by its token, the likeliest at the top, coloured by probability; a box marks the token that follows."""
    begin = place_among(segment, segment.context_only if first is None else first)
    frame = segment.top(n, temperature, slice(begin, begin + _some(tokens, "tokens")))
    columns = len(frame) // n
    probability, pieces, is_next = (frame[name].to_numpy().reshape(columns, n).T for name in ("probability", "piece", "is_next"))
    axes = axes_of(axes, (1.6 + 0.82 * columns, 1.2 + 0.36 * n))
    image = axes.imshow(probability, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for rank in range(n):
        for column in range(columns):
            colour = "white" if probability[rank, column] > 0.6 else "black"
            text = axes.text(column, rank, shown(pieces[rank, column], 9), ha="center", va="center", fontsize=7, color=colour)
            _in_fonts([text])
            if is_next[rank, column]:
                axes.add_patch(pyplot().Rectangle((column - 0.48, rank - 0.46), 0.96, 0.92, fill=False, edgecolor="C3", lw=1.6))
    label_tokens(axes, segment.tokens[begin : begin + columns], rotation=45, ha="right", fontsize=10)
    axes.set_yticks(range(n), range(1, n + 1))
    axes.set(xlabel="token", ylabel="rank", title=f"what the teacher expects next, T = {temperature:g} (box: what follows)")
    axes.figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    return axes


def plot_attention(
    segment: "SegmentView", layer: int | None = None, token: int | None = None, keys: int = 40, axes: Any = None
) -> Any:
    """The attention of one keyword over its context: a row for each stored head, a column for each of the last `keys` keys. `token`
    is the keyword's place (the last stored one if None), `layer` the last cached one if None."""
    layers = [a.layer for a in segment.cache.manifest.calibration.attention]
    if not layers:
        raise MismatchError("the cache holds no attention", expected="signals.attention", found="none", where=segment.cache.uri)
    array = segment.attention(layers[-1] if layer is None else layer)
    own = array.token.values[array.keyword.values]
    if not len(own):
        raise MismatchError("the segment has no keyword", expected="a stored row", where=f"segment {segment.index}")
    place = int(own[-1]) if token is None else token
    if place not in own:
        raise InputError("no row of this token is stored", expected=own.tolist(), found=place, where=f"segment {segment.index}")
    row = array.sel(token=place).values[:, : place + 1]
    first = max(0, place + 1 - _some(keys, "keys"))
    axes = axes_of(axes, (1.8 + 0.3 * (place + 1 - first), 1.3 + 0.4 * len(row)))
    image = axes.imshow(row[:, first:], cmap="magma_r", vmin=0, vmax=max(0.05, float(np.nanmax(row[:, first:]))), aspect="auto")
    label_tokens(axes, segment.tokens[first : place + 1])
    axes.set_yticks(range(len(row)), array["head"].values.tolist())
    left = float(np.nansum(row[:, :first]) / len(row))
    before = f" ({left:.0%} lies before what is shown)" if first else ""
    axes.set(ylabel="head", title=f"block {array.name.rsplit('_', 1)[1]}: where “{shown(segment.tokens[place])}” looks{before}")
    _in_fonts([axes.title])
    axes.figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    return axes


def _used_rows(cache: Cache, path: str, *others: str) -> list[NDArray[np.float32]]:
    """Rows of an array's first `MOST_ROWS` that hold something, and the same rows of others; MismatchError where none does."""
    arrays = [cache.read(each, 0, MOST_ROWS) for each in (path, *others)]
    first = arrays[0][:, 0]
    used = ~np.isnan(first) if first.dtype.kind == "f" else first != cache.array(path).fill_value
    if not used.any():
        raise MismatchError("none of the rows that were looked at holds anything", expected="one", found=path, where=cache.uri)
    return [array[used].astype(np.float32) for array in arrays]


def plot_tail_spectrum(cache: Cache, axes: Any = None) -> Any:
    """How much each direction of the tail basis moves the logits: the root mean square over the vocabulary and the first
    tokens, in nats, and the share of the whole up to it."""
    if not cache.manifest.calibration.tail_rank:
        raise MismatchError("the cache has no tail", expected="signals.distribution with rank above 0", found=0, where=cache.uri)
    basis, step = (cache.read(f"calibration/distribution/{name}").astype(np.float32) for name in ("tail_basis", "tail_step"))
    (stored,) = _used_rows(cache, "distribution/tail_codes")
    zigzag = cache.array("distribution/tail_codes").dtype == np.uint8
    codes = from_zigzag(stored.astype(np.uint8)).astype(np.float32) if zigzag else stored
    moved = np.sqrt((basis**2).mean(0)) * step * np.sqrt((codes**2).mean(0))
    share = np.cumsum(moved**2) / (moved**2).sum()
    axes = axes_of(axes, (6, 3.6))
    axes.semilogy(np.arange(1, len(moved) + 1), moved, label="of one direction")
    axes.set(xlabel="direction of the tail basis", ylabel="movement of a logit, nats (RMS)", title="spectrum of the tail basis")
    axes.grid(alpha=0.3)
    other = axes.twinx()
    other.plot(np.arange(1, len(moved) + 1), share, color="C1", label="share so far")
    other.set(ylabel="share of the squares so far", ylim=(0, 1.02))
    axes.legend(
        *(a + b for a, b in zip(axes.get_legend_handles_labels(), other.get_legend_handles_labels(), strict=True)),
        loc="center right",
    )
    return axes


def plot_explained_variance(cache: Cache, axes: Any = None) -> Any:
    """What the principal directions of each cached state keep of its variance, direction by direction on the first rows, up
    to what calibration measured for all of them; states in full width keep everything."""
    layouts = cache.manifest.calibration.hidden
    if not layouts:
        raise MismatchError("the cache holds no hidden states", expected="signals.hidden", found="none", where=cache.uri)
    taps = list(dict.fromkeys(layout.tap for layout in layouts))
    layers = sorted({layout.layer for layout in layouts})
    axes = axes_of(axes, (7, 3.8))
    colours = pyplot().get_cmap("viridis")(np.linspace(0, 0.9, len(layers)))
    styles = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1)))
    for layout in layouts:
        if layout.rank is None:
            share = np.ones(2)
            places = np.asarray([1, layout.width])
        else:
            values, scale = _used_rows(cache, f"{layout.group}/values", f"{layout.group}/scale")
            variance = (values * scale[:, None]).var(0)
            share = layout.explained_variance * np.cumsum(variance) / variance.sum()
            places = np.arange(1, layout.rank + 1)
        label = f"{layout.tap} {layout.layer}"
        axes.plot(
            places, share, color=colours[layers.index(layout.layer)], ls=styles[taps.index(layout.tap) % 6], label=label, lw=1.2
        )
    axes.set(xlabel="principal directions", ylabel="share of the variance", ylim=(0, 1.02), title="what hidden states keep")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return axes


def plot_surprise(segment: "SegmentView", first: int | None = None, tokens: int = 40, axes: Any = None) -> Any:
    """The teacher's surprise at each token and its entropy before it, in nats."""
    from signal_view.coloured import surprise_and_entropy

    begin = place_among(segment, segment.context_only if first is None else first)
    surprise, entropy = (values[begin : begin + _some(tokens, "tokens")] for values in surprise_and_entropy(segment))
    pieces = segment.tokens[begin : begin + tokens]
    axes = axes_of(axes, (1.5 + 0.27 * len(pieces), 3.4))
    axes.bar(range(len(pieces)), surprise, color="C0", alpha=0.7, label="surprise, −log p")
    axes.plot(range(len(pieces)), entropy, color="C3", marker=".", lw=1, label="entropy")
    label_tokens(axes, pieces)
    axes.set(ylabel="nats", title="how surprised, how unsure the teacher was", xlim=(-0.7, len(pieces) - 0.3))
    axes.legend(frameon=False)
    return axes
