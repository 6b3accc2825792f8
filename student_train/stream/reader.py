"""Reads whole units of the arrays that the losses need, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache


@dataclass(frozen=True, slots=True)
class Needs:
    """What the losses read: the distribution or not, and teacher layers of hidden states and attention rows."""

    distribution: bool
    hidden: tuple[int, ...]
    attention: tuple[int, ...]

    def arrays(self, cache: Cache) -> list[str]:
        """Paths of the arrays, tokens included."""
        groups = ["tokens/input_ids", "tokens/loss_mask"]
        groups += ["distribution/"] if self.distribution else []
        groups += [f"hidden/block_output/{layer}/" for layer in self.hidden]
        groups += [f"attention/{layer}/" for layer in self.attention]
        return [spec.path for spec in cache.manifest.specs if spec.path.startswith(tuple(groups))]


SEGMENT_COLUMNS = (
    "token_start",
    "length",
    "context_only",
    "next_token",
    "hidden_row_start",
    "hidden_rows",
    "attention_row_start",
    "attention_rows",
)


@dataclass(frozen=True, slots=True)
class LoadedUnit:
    """One unit in memory.

    `segments` has one row per segment, `first_segment` is the global number of its first, `rows` holds the arrays by path.
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
    for signal, path in (("hidden", "scale"), ("attention", "position")):
        rows_per_unit = next((n for p, n in capacity.items() if p.startswith(f"{signal}/") and p.endswith(path)), 0)
        columns[f"{signal}_row_start"] -= unit * rows_per_unit
    used = {
        "token": int(columns["token_start"][-1] + columns["length"][-1]),
        "hidden": int(columns["hidden_row_start"][-1] + columns["hidden_rows"][-1]),
        "attention": int(columns["attention_row_start"][-1] + columns["attention_rows"][-1]),
    }
    rows: dict[str, NDArray[Any]] = {}
    for path in needs.arrays(cache):
        kind = path.split("/")[0]
        first = unit * capacity[path]
        if path.endswith(("/weights", "/columns")):
            offsets = rows[path.rsplit("/", 1)[0] + "/offset"]
            lengths = rows[path.rsplit("/", 1)[0] + "/length"]
            count = int(offsets[-1] + lengths[-1]) if len(offsets) else 0
        else:
            count = used.get(kind, used["token"])
        rows[path] = cache.read(path, first, first + count)
        if path.endswith("/offset"):
            rows[path] = rows[path] - unit * capacity[path.removesuffix("offset") + "weights"]
        elif path.endswith("/position"):
            rows[path] = rows[path] - unit * unit_tokens
    first_segment = int(cache.segments_per_unit[:unit].sum())
    return LoadedUnit(unit, first_segment, columns, rows)


def load_window(cache: Cache, units: Sequence[int], needs: Needs) -> list[LoadedUnit]:
    """The units of a window."""
    return [load_unit(cache, unit, needs) for unit in units]
