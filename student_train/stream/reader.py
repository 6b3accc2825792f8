"""Reads whole units of the arrays that the losses need, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.signals import Tap

State = tuple[Tap, int]


@dataclass(frozen=True, slots=True)
class Needs:
    """What the losses read: the distribution or not, hidden states by (tap, layer), attention rows by layer."""

    distribution: bool
    hidden: tuple[State, ...]
    attention: tuple[int, ...]

    def arrays(self, cache: Cache) -> list[str]:
        """Paths of the arrays, tokens included."""
        groups = ["tokens/input_ids", "tokens/loss_mask"]
        groups += ["distribution/head", "distribution/tail", "distribution/scalars"] if self.distribution else []
        groups += ["hidden/rows/", *(f"hidden/{tap}/{layer}/" for tap, layer in self.hidden)] if self.hidden else []
        groups += ["attention/rows/", *(f"attention/{layer}/" for layer in self.attention)] if self.attention else []
        return [spec.path for spec in cache.manifest.specs if spec.path.startswith(tuple(groups))]


SEGMENT_COLUMNS = ("token_start", "length", "context_only", "next_token")


@dataclass(frozen=True, slots=True)
class LoadedUnit:
    """One unit in memory.

    `segments` has one row per segment (`hidden_row_start`, `attention_rows` and their like where rows are sampled),
    `first_segment` is the global number of its first, `rows` holds the arrays by path.
    Starts, positions and offsets count from the unit's own first row.
    """

    unit: int
    first_segment: int
    segments: dict[str, NDArray[np.int64]]
    rows: dict[str, NDArray[Any]]


def load_unit(cache: Cache, unit: int, needs: Needs) -> LoadedUnit:
    """Read one unit. Only rows that hold something are read: filler at the end of a unit is not."""
    capacity = cache.capacity_rows
    unit_tokens = cache.manifest.plan.unit_tokens
    columns = {name: column.astype(np.int64) for name, column in cache.segment_columns(unit, *SEGMENT_COLUMNS).items()}
    columns["token_start"] -= unit * unit_tokens
    used = {"token": int(columns["token_start"][-1] + columns["length"][-1])}
    for signal, wanted in (("hidden", needs.hidden), ("attention", needs.attention)):
        if wanted and f"{signal}/rows/position" in capacity:
            ranges = cache.segment_columns(unit, "row_start", "rows", group=f"{signal}/segments")
            first_row = unit * capacity[f"{signal}/rows/position"]
            columns[f"{signal}_row_start"] = ranges["row_start"].astype(np.int64) - first_row
            columns[f"{signal}_rows"] = ranges["rows"].astype(np.int64)
            used[signal] = int(columns[f"{signal}_row_start"][-1] + columns[f"{signal}_rows"][-1])
    rows: dict[str, NDArray[Any]] = {}
    for path in needs.arrays(cache):
        first = unit * capacity[path]
        if path.endswith(("/weights", "/columns")):
            offsets, lengths = rows["attention/rows/offset"], rows["attention/rows/length"]
            count = int(offsets[-1] + lengths[-1]) if len(offsets) else 0
        else:
            count = used.get(path.split("/")[0], used["token"])
        rows[path] = cache.read(path, first, first + count)
        if path == "attention/rows/offset":
            rows[path] = rows[path] - unit * capacity[f"attention/{needs.attention[0]}/weights"]
        elif path.endswith("/position"):
            rows[path] = rows[path] - unit * unit_tokens
    return LoadedUnit(unit, cache.first_segment(unit), columns, rows)


def load_window(cache: Cache, units: Sequence[int], needs: Needs) -> list[LoadedUnit]:
    """The units of a window."""
    return [load_unit(cache, unit, needs) for unit in units]
