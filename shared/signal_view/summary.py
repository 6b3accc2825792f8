"""A cache at a glance: the same sections as text and as HTML. No signal is read; the sizes come from the packed records, and of a
large cache from its first units. Everything that a cache says is escaped.
"""

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from signal_store.cache import Cache
from signal_store.format.arrays import ArraySpec
from signal_store.ledger.seal import group_of
from signal_store.manifest import SourceIdentity
from signal_store.sealed_part import SealedPart
from signal_view.meaning import meaning

MOST_UNITS = 256
"""Units whose sizes are added up; what is more is reckoned from these."""
MOST_ROWS = 40
"""Of a section; what is more is counted."""


@dataclass(frozen=True, slots=True)
class Section:
    """A table: its columns, and rows of text; `more` rows were left out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    more: int = 0

    @classmethod
    def of(cls, title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> "Section":
        """At most `MOST_ROWS` of them."""
        return cls(title, columns, tuple(rows[:MOST_ROWS]), max(0, len(rows) - MOST_ROWS))


@dataclass(frozen=True, slots=True)
class Summary:
    """`line`: the cache in one; `sections` in order."""

    line: str
    sections: tuple[Section, ...]


def summarise(cache: Cache) -> Summary:
    """Identity, sizes, arrays, coverage, provenance."""
    sections = (_identity(cache), _sizes(cache), _tree(cache), _coverage(cache), _sources(cache), _provenance(cache))
    return Summary(repr(cache), tuple(section for section in sections if section.rows))


def text_of(summary: Summary) -> str:
    """For a terminal."""
    lines = [summary.line]
    for section in summary.sections:
        table = [tuple(cell.replace("\n", "↵") for cell in row) for row in (section.columns, *section.rows) if any(row)]
        widths = [max(len(row[column]) for row in table) for column in range(len(section.columns))]
        lines += ["", section.title]
        lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        lines += [f"  and {section.more} more"] if section.more else []
    return printable("\n".join(lines))


def printable(text: str) -> str:
    """Without what would steer a terminal: control and direction characters, but for line ends and tabs, are shown by their code
    points."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cf"} else ascii(c)[1:-1] for c in text)


def html_of(summary: Summary) -> str:
    """For a notebook: each section opens and closes."""
    parts = [f"<div class='teacher-cache'><code>{html.escape(summary.line)}</code>"]
    for number, section in enumerate(summary.sections):
        opened = " open" if number < 2 else ""
        parts.append(f"<details{opened}><summary>{html.escape(section.title)}</summary>{table_html(section)}</details>")
    return "".join(parts) + "</div>"


def table_html(section: Section) -> str:
    """A section as a table."""
    cell = "text-align:left"
    head = "".join(f"<th style='{cell}'>{html.escape(column)}</th>" for column in section.columns)
    rows = ("".join(f"<td style='{cell}'>{html.escape(text)}</td>" for text in row) for row in section.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    more = f"<p>and {section.more} more</p>" if section.more else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _identity(cache: Cache) -> Section:
    m = cache.manifest
    rows = [
        ("cache id", m.cache_id),
        ("generation", str(cache.seal.generation)),
        ("teacher", f"{m.teacher.name} ({m.teacher.model_type}, {m.teacher.num_layers} blocks of width {m.teacher.hidden_size})"),
        ("tokens", f"{cache.num_tokens:,} in {len(cache):,} segments of at most {m.plan.context}"),
        ("units", f"{cache.seal.num_units:,} of {m.plan.unit_tokens:,} rows"),
        ("vocabulary", f"{m.tokenizer.vocab_size:,}"),
        ("signals", ", ".join(name for name, signal in m.signals if signal is not None)),
        ("tail rank", str(m.calibration.tail_rank)) if m.signals.distribution is not None else ("", ""),
        *((f"overlay {number}", part.uri) for number, part in enumerate(cache.parts[1:], start=1)),
    ]
    return Section.of("identity", ("", ""), [row for row in rows if row[0]])


def signal_bytes(cache: Cache) -> dict[str, float]:
    """Bytes of each top-level group; of more than `MOST_UNITS` units, reckoned from the first."""
    found: dict[str, float] = {}
    for part in cache.parts:
        units = min(MOST_UNITS, part.seal.num_units)
        for spec in part.manifest.specs:
            top = spec.path.split("/")[0]
            found[top] = found.get(top, 0.0) + _bytes_of(part, spec, units) * part.seal.num_units / max(1, units)
    return found


def _bytes_of(part: SealedPart, spec: ArraySpec, units: int) -> float:
    lengths = part.group[f"{group_of(spec.path, part.seal.generation)}/length"][: units * spec.shards_per_unit]  # type: ignore[index]
    return float(lengths.sum())  # type: ignore[union-attr]


def _sizes(cache: Cache) -> Section:
    found = sorted(signal_bytes(cache).items(), key=lambda item: -item[1])
    about = "about " if cache.seal.num_units > MOST_UNITS else ""
    tokens = max(1, cache.num_tokens)
    rows = [(name, f"{about}{size / 2**20:,.2f} MiB", f"{size / tokens:,.1f}") for name, size in found]
    total = sum(size for _, size in found)
    rows.append(("all arrays", f"{about}{total / 2**20:,.2f} MiB", f"{total / tokens:,.1f}"))
    return Section.of("size (calibration and ledger come on top)", ("signal", "stored", "bytes per token"), rows)


def _tree(cache: Cache) -> Section:
    rows = []
    for part in cache.parts:
        for spec in sorted(part.manifest.specs, key=lambda spec: spec.path):
            what, unit = meaning(spec.path)
            shape = (cache.seal.num_units * spec.capacity_rows, *spec.row_shape)
            named = ", ".join(f"{dim}: {size:,}" for dim, size in zip(spec.dimension_names, shape, strict=True))
            rows.append((spec.path, spec.dtype, named, unit, what))
    return Section.of("arrays (rows with the room that units do not use)", ("path", "dtype", "shape", "unit", "what it is"), rows)


def _coverage(cache: Cache) -> Section:
    signal = cache.manifest.signals.distribution
    if signal is None:
        return Section("coverage", (), ())
    masses = zip(signal.temperatures, cache.manifest.calibration.coverage, strict=True)
    rows = [(f"{temperature:g}", f"{mass:.4f}", f"{1 - mass:.4f}") for temperature, mass in masses]
    return Section.of("coverage by temperature", ("temperature", "mean mass of the head", "of the tail"), rows)


def _sources(cache: Cache) -> Section:
    rows = [
        (
            s.name,
            s.split,
            f"{s.num_tokens:,}",
            f"{s.num_segments:,}",
            f"{s.num_documents:,}",
            f"{s.num_empty_documents:,}",
            s.task or "",
            _tagger(s),
        )
        for s in cache.sources
    ]
    return Section.of("sources", ("name", "split", "tokens", "segments", "documents", "empty ones", "task", "tagger"), rows)


def _tagger(source: SourceIdentity) -> str:
    return "" if source.tagger is None else f"{source.tagger.parser} {source.tagger.version}"


def _provenance(cache: Cache) -> Section:
    m = cache.manifest
    rows = [
        ("teacher's weights", m.teacher.weights_digest),
        ("teacher's config", m.teacher.config_digest),
        ("ran in", f"{m.teacher.dtype}, {m.teacher.attn_implementation} attention, {m.plan.forward}"),
        ("tokenizer", m.tokenizer.digest),
        ("plan", m.plan.digest),
        ("content", cache.seal.content_digest),
        *((f"text of {source.name}", source.fingerprint) for source in cache.sources),
    ]
    return Section.of("provenance", ("", ""), rows)
