"""Weights to look at: a segment's text, token by token, and the surface between the corners."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from signal_store.cache import Cache
from signal_store.errors import MismatchError
from signal_store.format.roles import LEVELS
from signal_store.signals.distribution import SCALARS
from signal_view.coloured import tokens_html
from signal_view.plots import axes_of, label_tokens
from signal_view.tokens import token_texts
from student_train.importance.rules import LEAST, MOST, Rules
from student_train.importance.token_weights import TokenWeights, surface


@dataclass(frozen=True, slots=True)
class TokenWeight:
    """A token's text, the weight of the row that predicts it (None where no row that counts does), and what it is. Tokens that are
    parts of one character stand together, with their mean weight."""

    text: str
    weight: float | None
    roles: dict[str, str]


def token_weights(cache: Cache, segment: int, rules: Rules) -> list[TokenWeight]:
    """Of one segment; MismatchError where the cache has no tags or no distribution."""
    for path in ("tags/roles", "distribution/scalars"):
        if path not in cache.capacity_rows:
            raise MismatchError("weights need what the cache does not hold", expected=path, found="none", where=cache.uri)
    found = cache[segment]
    rows = slice(found.token_start, found.token_start + len(found))
    roles = cache.read("tags/roles", rows.start, rows.stop)
    entropy = cache.read("distribution/scalars", rows.start, rows.stop)[:, SCALARS.index("entropy")]
    counts = cache.read("tokens/loss_mask", rows.start, rows.stop)[:-1] > 0
    weights = TokenWeights.of(rules, cache.manifest.tokenizer.vocab_size).weights(
        roles[1:], np.nan_to_num(entropy[:-1].astype(np.float32))
    )
    weighed: list[TokenWeight] = []
    for first, stop, text in token_texts(cache).groups(found.input_ids.tolist()):
        mine = slice(max(0, first - 1), stop - 1)
        own = weights[mine][counts[mine]]
        said = {level: names[n] for n, (level, names) in zip(roles[first], LEVELS.items(), strict=True) if n}
        weighed.append(TokenWeight(text, float(own.mean()) if first and len(own) else None, said))
    return weighed


def coloured(tokens: list[TokenWeight]) -> Text:
    """The text, from blue (0.2) through grey (1) to red (3)."""
    text = Text()
    for token in tokens:
        colour = "" if token.weight is None else ",".join(map(str, _colour(token.weight)))
        text.append(token.text, style=f"black on rgb({colour})" if colour else None)
    return text


def _colour(weight: float) -> tuple[int, int, int]:
    share = (np.log(weight) - np.log(LEAST)) / (np.log(MOST) - np.log(LEAST))
    blue, grey, red = (120, 160, 255), (225, 225, 225), (255, 120, 110)
    middle = -np.log(LEAST) / (np.log(MOST) - np.log(LEAST))  # a weight of 1
    first, second, along = (blue, grey, share / middle) if share < middle else (grey, red, (share - middle) / (1 - middle))
    r, g, b = (round(a + (c - a) * float(along)) for a, c in zip(first, second, strict=True))
    return r, g, b


def weights_html(tokens: list[TokenWeight]) -> str:
    """The text for a notebook or a page, from white (0) to red (3); what a token's word is shows on hover."""
    values = np.asarray([np.nan if token.weight is None else token.weight for token in tokens], np.float32)
    says = [
        ", ".join([*([] if t.weight is None else [f"weight {t.weight:.2f}"]), *(f"{k}: {v}" for k, v in t.roles.items())])
        for t in tokens
    ]
    return tokens_html([token.text for token in tokens], values, says, MOST)


def plot_weights(tokens: list[TokenWeight], first: int = 0, count: int = 40, axes: Any = None) -> Any:
    """Weights along a text as bars; the line is 1, which changes nothing. Returns the matplotlib Axes."""
    some = tokens[first : first + count]
    axes = axes_of(axes, (1.5 + 0.27 * len(some), 3))
    heights = [0.0 if token.weight is None else token.weight for token in some]
    colours = ["0.8" if t.weight is None else tuple(part / 255 for part in _colour(t.weight)) for t in some]
    axes.bar(range(len(some)), heights, color=colours, edgecolor="0.5", lw=0.5)
    axes.axhline(1, color="0.3", lw=0.8, ls="--")
    label_tokens(axes, [token.text for token in some])
    axes.set(ylabel="weight", ylim=(0, MOST), xlim=(-0.7, len(some) - 0.3), title="how much each token counts")
    return axes


def plot_surface(rules: Rules, axes: Any = None) -> Any:
    """The weight over impact and the teacher's confidence, with lines of equal weight; returns the matplotlib Axes."""
    axes = axes_of(axes, (5.4, 4.4))
    grid = np.linspace(0, 1, 121, dtype=np.float32)
    weights = surface(grid[None], grid[:, None], rules.corners)
    mesh = axes.pcolormesh(grid, grid, weights, cmap="viridis", vmin=LEAST, vmax=MOST, shading="gouraud")
    lines = axes.contour(grid, grid, weights, levels=(0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5), colors="white", linewidths=0.8)
    axes.clabel(lines, fmt="%g", fontsize=8)
    axes.set(xlabel="impact of the word", ylabel="confidence of the teacher, 1 - H / log V", title="weight of a token")
    axes.figure.colorbar(mesh, ax=axes, label="weight")
    return axes


def save_surface(rules: Rules, path: Path) -> None:
    """The plot as a picture."""
    plot_surface(rules).figure.savefig(path, dpi=150)
