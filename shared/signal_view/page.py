"""One self-contained HTML page: no network, no script but its own, which the page's own policy names by its hash; all that a cache
or a run says is escaped.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

from signal_view.extras import pyplot
from signal_view.summary import Section, table_html

_HERE = files("signal_view")


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a page: a title, and HTML that is safe already."""

    title: str
    body: str


def page(title: str, blocks: Sequence[Block]) -> str:
    """The whole document."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<a href="#part-{n}">{html.escape(block.title)}</a>' for n, block in enumerate(blocks))
    parts = "".join(f'<section id="part-{n}"><h2>{html.escape(b.title)}</h2>{b.body}</section>' for n, b in enumerate(blocks))
    head = (
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{style}</style>",
    )
    body = f"<h1>{html.escape(title)}</h1><nav>{links}</nav>{parts}<script>{script}</script>"
    return f'<!doctype html><html lang="en"><head>{"".join(head)}</head><body>{body}</body></html>\n'


def _policy(script: str) -> str:
    """Nothing is fetched, and no script runs but this one."""
    own = base64.b64encode(sha256(script.encode()).digest()).decode()
    rules = ("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{own}'", "base-uri 'none'")
    return "; ".join((*rules, "form-action 'none'"))


def table(section: Section) -> str:
    """A section as a table that scrolls where it is too wide."""
    return f'<div class="scroll">{table_html(section)}</div>'


def picture(axes: Any, says: str) -> str:
    """A plot as a picture in the page; the plot is closed."""
    data = io.BytesIO()
    axes.figure.savefig(data, dpi=110, format="png")
    pyplot().close(axes.figure)
    source = base64.b64encode(data.getvalue()).decode()
    words = html.escape(says, quote=True)
    return f'<figure><img alt="{words}" src="data:image/png;base64,{source}"><figcaption>{words}</figcaption></figure>'


def searchable(name: str, samples: Sequence[tuple[str, str]]) -> str:
    """(summary, safe HTML) of samples that open and close, under a field that finds among them."""
    folded = "".join(f"<details><summary><bdi>{html.escape(summary)}</bdi></summary>{body}</details>" for summary, body in samples)
    return (
        f'<p><input type="search" data-of="{name}" aria-label="find in {name}" placeholder="find in {name}"> '
        f'<span id="{name}-count" class="note"></span></p><div id="{name}">{folded}</div>'
    )


def progress(done: float, whole: float, says: str) -> str:
    """A bar, and words beside it."""
    return f'<p><progress value="{done:g}" max="{max(whole, 1e-9):g}"></progress><br>{html.escape(says)}</p>'
