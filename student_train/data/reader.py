"""Reads whole units of the arrays that the losses need, and nothing else; each array when it is first asked for, once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.signals import Tap
from student_train.data.batch import IGNORE

State = tuple[Tap, int]


@dataclass(frozen=True, slots=True)
class Needs:
    """What the losses read: the distribution or not, hidden states by (tap, layer), attention rows by layer (of keywords, and with
    `steps` of the tokens before them too), attention statistics by layer, paths of replay, roles of words, evidence by layer,
    coverage, how sparse FFNs are."""

    distribution: bool
    hidden: tuple[State, ...]
    attention: tuple[int, ...]
    steps: bool = False
    statistics: tuple[int, ...] = ()
    replay: bool = False
    tags: bool = False
    evidence: tuple[int, ...] = ()
    coverage: bool = False
    sparsity: bool = False

    def union(self, other: "Needs") -> "Needs":
        """What either reads."""
        joined: dict[str, Any] = {
            name: tuple(dict.fromkeys(getattr(self, name) + getattr(other, name)))
            for name in ("hidden", "attention", "statistics", "evidence")
        }
        flags = ("distribution", "steps", "replay", "tags", "coverage", "sparsity")
        either: dict[str, Any] = {name: getattr(self, name) or getattr(other, name) for name in flags}
        return Needs(**joined, **either)

    def arrays(self, cache: Cache) -> list[str]:
        """Paths of the arrays, tokens included."""
        groups = ["tokens/input_ids", "tokens/loss_mask"]
        groups += ["distribution/head", "distribution/tail", "distribution/scalars"] if self.distribution else []
        groups += ["hidden/rows/", *(f"hidden/{tap}/{layer}/" for tap, layer in self.hidden)] if self.hidden else []
        groups += ["attention/rows/", *(f"attention/{layer}/" for layer in self.attention)] if self.attention else []
        groups += [f"stats/attention/{layer}/" for layer in self.statistics]
        groups += ["stats/ffn/"] if self.sparsity else []
        groups += ["tags/"] if self.tags else []
        groups += ["replay/rows/", "replay/path/"] if self.replay else []
        groups += ["evidence/rows/", *(f"evidence/{layer}/" for layer in self.evidence)] if self.evidence else []
        groups += ["coverage/rows/", "coverage/words/"] if self.coverage else []
        return [spec.path for spec in cache.manifest.specs if spec.path.startswith(tuple(groups))]


TOKENS_ONLY = Needs(distribution=False, hidden=(), attention=())
RAGGED = ("/weights", "/columns")
SEGMENT_COLUMNS = ("token_start", "length", "context_only", "next_token", "source")


@dataclass(frozen=True, slots=True)
class UnitText:
    """A unit's token rows: `input_ids` int64 [n]; `labels` int64 [n], -100 where none is stored; `kept` by segment, its rows whose
    distribution counts: a slice where they are neighbours."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    kept: list[slice | NDArray[np.int64]]

    @classmethod
    def of(cls, input_ids: NDArray[np.int64], mask: NDArray[np.uint8], segments: dict[str, NDArray[np.int64]]) -> "UnitText":
        """From the stored arrays and the segment table."""
        start, end = segments["token_start"], segments["token_start"] + segments["length"]
        following = np.append(input_ids[1:], 0)
        following[end - 1] = segments["next_token"]
        counting = np.flatnonzero((mask == 1) | (mask == 2))
        kept: list[slice | NDArray[np.int64]] = []
        for first, last in np.searchsorted(counting, np.stack([start, end], 1)).tolist():
            rows = counting[first:last]
            neighbours = len(rows) > 0 and rows[-1] - rows[0] + 1 == len(rows)
            kept.append(slice(int(rows[0]), int(rows[-1]) + 1) if neighbours else rows)
        return cls(input_ids, np.where(mask == 1, following, IGNORE), kept)


@dataclass(slots=True)
class UnitReader:
    """One unit. `segments` has one row per segment (`hidden_row_start`, `attention_rows` and their like where rows are sampled),
    `first_segment` is the global number of its first; starts, positions and offsets count from the unit's own first row.

    Only rows that hold something are read: filler at the end of a unit is not.
    """

    cache: Cache
    unit: int
    needs: Needs
    segments: dict[str, NDArray[np.int64]]
    _rows: dict[str, NDArray[Any]] = field(default_factory=dict)
    _text: UnitText | None = None
    _next_roles: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, cache: Cache, unit: int, needs: Needs) -> "UnitReader":
        """With its segment table read."""
        columns = {name: column.astype(np.int64) for name, column in cache.segment_columns(unit, *SEGMENT_COLUMNS).items()}
        columns["token_start"] -= unit * cache.manifest.plan.unit_tokens
        for signal in ("hidden", "attention", "replay", "evidence", "coverage"):
            if getattr(needs, signal) and f"{signal}/rows/position" in cache.capacity_rows:
                ranges = cache.segment_columns(unit, "row_start", "rows", group=f"{signal}/segments")
                first_row = unit * cache.capacity_rows[f"{signal}/rows/position"]
                columns[f"{signal}_row_start"] = ranges["row_start"].astype(np.int64) - first_row
                columns[f"{signal}_rows"] = ranges["rows"].astype(np.int64)
        return cls(cache, unit, needs, columns)

    @property
    def first_segment(self) -> int:
        """Global number of its first segment."""
        return self.cache.first_segment(self.unit)

    def has(self, path: str) -> bool:
        """Whether the cache holds the array."""
        return path in self.cache.capacity_rows

    def rows(self, path: str) -> NDArray[Any]:
        """The unit's rows of an array."""
        if path not in self._rows:
            self._read([path])
        return self._rows[path]

    @property
    def text(self) -> UnitText:
        """Its token rows, with labels."""
        if self._text is None:
            ids, mask = self.rows("tokens/input_ids"), self.rows("tokens/loss_mask")
            self._text = UnitText.of(ids.astype(np.int64), mask, self.segments)
        return self._text

    @property
    def next_roles(self) -> NDArray[np.uint8]:
        """uint8 [n, 4]: roles of the token that each row predicts; none for a segment's last row, whose next token is elsewhere."""
        if self._next_roles is None:
            found = np.zeros_like(self.rows("tags/roles"))
            found[:-1] = self.rows("tags/roles")[1:]
            found[self.segments["token_start"] + self.segments["length"] - 1] = 0
            self._next_roles = found
        return self._next_roles

    def read_all(self) -> None:
        """Read every array that is needed; first what says how long the others are."""
        paths = self.needs.arrays(self.cache)
        ragged = [path for path in paths if path.endswith(RAGGED)]
        for wanted in ([path for path in paths if path not in ragged], ragged):
            self._read([path for path in wanted if path not in self._rows])
        _ = self.text

    def _read(self, paths: Sequence[str]) -> None:
        found = self.cache.read_unit(self.unit, {path: self._count(path) for path in paths})
        for path, rows in found.items():
            if path == "attention/rows/offset":
                rows = rows - self.unit * self.cache.capacity_rows[f"attention/{self.needs.attention[0]}/weights"]
            elif path.endswith("/position"):
                rows = rows - self.unit * self.cache.manifest.plan.unit_tokens
            self._rows[path] = rows

    def _count(self, path: str) -> int:
        """Rows of an array that hold something."""
        signal = path.split("/")[0]
        if signal == "stats":
            return len(self.segments["length"])
        if path.endswith(RAGGED):
            offsets, lengths = self.rows("attention/rows/offset"), self.rows("attention/rows/length")
            return int(offsets[-1] + lengths[-1]) if len(offsets) else 0
        start, count = (f"{signal}_row_start", f"{signal}_rows") if f"{signal}_rows" in self.segments else ("token_start", "length")
        return int(self.segments[start][-1] + self.segments[count][-1])


def load_units(cache: Cache, units: Sequence[int], needs: Needs) -> list[UnitReader]:
    """Units with their segment tables."""
    return [UnitReader.of(cache, unit, needs) for unit in units]
