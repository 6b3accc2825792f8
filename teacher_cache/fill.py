"""fill: run the teacher over each unit that has no record yet, write its shards to staging, and commit.

Encoding and writing of a batch overlap the next forward pass. Any number of workers may fill: the first record of a unit
stands, another attempt at it is thrown away.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signal_store.arrays import ArraySpec
from signal_store.errors import MismatchError
from signal_store.ledger import Document, UnitRecord, attempt_folder, commit, find_document, staging_prefix, unit_key
from signal_store.objects import LocalObjects, Objects
from signal_store.progress import progress_bar
from signal_store.shard_writer import UnitArrayWriter
from teacher_cache.calibrate import Calibrated, batches_of, calibrate
from teacher_cache.extract.attention import extract_attention
from teacher_cache.extract.distribution import extract_distribution
from teacher_cache.extract.hidden import extract_hidden
from teacher_cache.extract.rows import Extracted, Rows
from teacher_cache.recipe import CacheRecipe
from teacher_cache.teacher import TeacherBatch, think
from teacher_cache.unit_plan import UnitPlan

MAX_SATURATION = 1e-3


def fill(recipe: CacheRecipe) -> Calibrated:
    """Finish every unit; what is committed already is not computed again."""
    calibrated = calibrate(recipe)
    objects = LocalObjects(recipe.cache)
    units = calibrated.plan.document.body["units"]
    with progress_bar() as progress:
        bar = progress.add_task("fill", total=sum(u["tokens"] for u in units), unit="tokens")
        for unit in range(len(units)):
            record = find_document(objects, unit_key(unit))
            if record is None:
                record = fill_unit(calibrated, objects, unit, on_tokens=lambda n: progress.advance(bar, n))
            else:
                progress.advance(bar, units[unit]["tokens"])
            _refuse_another_cache(record, calibrated)
            publish_unit(objects, record, calibrated.manifest.specs)
    return calibrated


def fill_unit(calibrated: Calibrated, objects: Objects, unit: int, on_tokens: Callable[[int], None] = lambda _n: None) -> Document:
    """One attempt at one unit; returns the record that stands, this attempt's or an earlier one's."""
    planned = calibrated.plan.unit(objects, unit)
    started = time.perf_counter()
    specs = calibrated.manifest.specs
    with attempt_folder(objects, f"{unit:07d}") as (attempt, prefix), _Writers(objects, prefix, specs, unit) as writers:
        writers.append(_plan_rows(calibrated, planned, unit))
        for batch in batches_of(calibrated, planned):
            writers.append_later(_extract(calibrated, planned, batch))
            on_tokens(int(planned.length[batch.first : batch.last].sum()))
        record = writers.finish(calibrated.manifest.cache_id, unit)
    # From here on the staged objects may be the committed ones: nothing but a lost race removes them.
    about = {"seconds": time.perf_counter() - started, "threads": torch.get_num_threads(), "device": str(calibrated.teacher.device)}
    standing, mine = commit(objects, unit_key(unit), record.to_body(), attempt, **about)
    if not mine:
        objects.delete_tree(prefix)
    return standing


def publish_unit(objects: Objects, record: Document, specs: tuple[ArraySpec, ...]) -> None:
    """Move a committed attempt's shards to their zarr keys. Idempotent, by anyone who sees the record."""
    unit = record.body["unit"]
    prefix = staging_prefix(f"{unit:07d}", record.about["attempt"])
    for spec in specs:
        for shard in range(spec.shards_per_unit):
            key = spec.shard_key(unit * spec.shards_per_unit + shard)
            objects.publish(f"{prefix}/{key}", key)
    objects.delete_tree(prefix)


def _refuse_another_cache(record: Document, calibrated: Calibrated) -> None:
    if record.body["cache_id"] != calibrated.manifest.cache_id:
        raise MismatchError(
            "a unit belongs to another cache",
            expected=calibrated.manifest.cache_id,
            found=record.body["cache_id"],
            where=unit_key(record.body["unit"]),
        )


class _Writers:
    """The open arrays of one unit. `append_later` hands rows to one background thread, at most one batch ahead."""

    def __init__(self, objects: Objects, prefix: str, specs: tuple[ArraySpec, ...], unit: int) -> None:
        self._stack = contextlib.ExitStack()
        self._writers = {s.path: self._stack.enter_context(UnitArrayWriter(objects, prefix, s, unit)) for s in specs}
        self._thread = self._stack.enter_context(ThreadPoolExecutor(max_workers=1))
        self._pending: Future[None] | None = None
        self._saturated: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> "_Writers":
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def append(self, rows: Rows) -> None:
        for path, array in rows.items():
            self._writers[path].append(array)

    def append_later(self, extracted: Extracted) -> None:
        for signal, (hit, of) in extracted.saturated.items():
            before = self._saturated.get(signal, (0, 0))
            self._saturated[signal] = (before[0] + hit, before[1] + of)
        self._wait()
        self._pending = self._thread.submit(self.append, extracted.rows)

    def finish(self, cache_id: str, unit: int) -> UnitRecord:
        self._wait()
        saturation = {signal: hit / max(1, of) for signal, (hit, of) in self._saturated.items()}
        for signal, share in saturation.items():
            if share > MAX_SATURATION:
                raise MismatchError(
                    f"codes of {signal} hit their limit",
                    expected=f"at most {MAX_SATURATION} of them",
                    found=f"{share:.2g}",
                    where=f"unit {unit}",
                    remedy="Calibrate on more tokens: raise calibration.tokens_per_source, in another folder.",
                )
        return UnitRecord(cache_id, unit, 0, {path: writer.close() for path, writer in self._writers.items()}, saturation)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _extract(calibrated: Calibrated, unit: UnitPlan, batch: TeacherBatch) -> Extracted:
    """Forward pass and codes of one batch."""
    manifest = calibrated.manifest
    hidden, attention = manifest.calibration.hidden, manifest.calibration.attention
    thoughts = think(calibrated.teacher, unit, batch, [h.layer for h in hidden], [a.layer for a in attention])
    first = int(unit.token_start[batch.first])
    tokens = slice(first, first + len(thoughts.hidden))
    parts: list[Extracted] = []
    if manifest.signals.distribution is not None:
        labels = torch.from_numpy(unit.labels()[tokens]).to(thoughts.hidden.device)
        found = extract_distribution(calibrated.distribution, calibrated.teacher.head, thoughts.hidden, labels)
        parts.append(Extracted(_blank(found.rows, manifest.specs, _context_rows(unit, tokens)), found.saturated))
    if manifest.signals.hidden is not None:
        places = np.arange(len(thoughts.hidden))
        every = manifest.signals.hidden.every
        if every > 1:
            places = unit.hidden_positions(every)
            places = places[(places >= tokens.start) & (places < tokens.stop)] - first
        for h in hidden:
            found = extract_hidden(calibrated.hidden[h.layer], h.layer, thoughts.blocks[h.layer], places)
            blank = _context_rows(unit, tokens) if every == 1 else np.zeros(len(places), dtype=bool)
            parts.append(Extracted(_blank(found.rows, manifest.specs, blank), found.saturated))
    parts += [extract_attention(a, thoughts.rows[a.layer], thoughts.row_lengths) for a in attention]
    return Extracted(
        {p: r for part in parts for p, r in part.rows.items()}, {s: n for part in parts for s, n in part.saturated.items()}
    )


def _context_rows(unit: UnitPlan, tokens: slice) -> NDArray[np.bool_]:
    """bool [n]: rows that are there as context only and hold no signal."""
    segment = unit.segment_of_token
    place = np.arange(unit.num_tokens) - unit.token_start[segment]
    return (place < unit.context_only[segment])[tokens]


def _blank(rows: Rows, specs: tuple[ArraySpec, ...], where: NDArray[np.bool_]) -> Rows:
    if not where.any():
        return rows
    fill_of = {spec.path: spec.fill for spec in specs}
    return {path: np.where(where.reshape(-1, *[1] * (a.ndim - 1)), fill_of[path], a) for path, a in rows.items()}


def _plan_rows(calibrated: Calibrated, unit_plan: UnitPlan, unit: int) -> Rows:
    """The rows that need no teacher: tokens, segments, positions."""
    manifest = calibrated.manifest
    specs = {spec.path: spec for spec in manifest.specs}
    first_token = unit * manifest.plan.unit_tokens
    lengths = unit_plan.attention_lengths(manifest.calibration.attention[0].max_columns if manifest.calibration.attention else None)
    every = manifest.signals.hidden.every if manifest.signals.hidden else 1
    hidden_positions = unit_plan.hidden_positions(every)
    columns: dict[str, NDArray[Any]] = {
        "token_start": unit_plan.token_start + first_token,
        "length": unit_plan.length,
        "context_only": unit_plan.context_only,
        "document": unit_plan.document,
        "source": unit_plan.source,
        "next_token": unit_plan.next_token,
        "token_hash": unit_plan.token_hash,
        **_row_ranges("attention", unit_plan, unit_plan.keyword, unit * _rows_per_unit(specs, "attention/", "/position")),
    }
    if every > 1:
        columns |= _row_ranges("hidden", unit_plan, hidden_positions, unit * _rows_per_unit(specs, "hidden/", "/position"))
    else:  # one row a token
        columns |= {"hidden_row_start": unit_plan.token_start + first_token, "hidden_rows": unit_plan.length}
    rows: dict[str, NDArray[Any]] = {f"segments/{name}": column for name, column in columns.items()}
    rows |= {f"tokens/{name}": getattr(unit_plan, name) for name in ("input_ids", "loss_mask", "byte_end")}
    for h in manifest.calibration.hidden:
        if every > 1:
            rows[f"hidden/block_output/{h.layer}/position"] = hidden_positions + first_token
    for a in manifest.calibration.attention:
        entries = specs[f"attention/{a.layer}/weights"].capacity_rows
        rows[f"attention/{a.layer}/position"] = unit_plan.keyword + first_token
        rows[f"attention/{a.layer}/offset"] = unit * entries + np.cumsum(lengths) - lengths
        rows[f"attention/{a.layer}/length"] = lengths
    return {path: array.astype(specs[path].dtype, copy=False) for path, array in rows.items()}


def _rows_per_unit(specs: Mapping[str, ArraySpec], start: str, end: str) -> int:
    """Rows a unit has in the arrays of a sampled signal; all its layers have the same, 0 where it is not cached."""
    return next((spec.capacity_rows for path, spec in specs.items() if path.startswith(start) and path.endswith(end)), 0)


def _row_ranges(signal: str, unit_plan: UnitPlan, positions: NDArray[np.int64], first_row: int) -> dict[str, NDArray[np.int64]]:
    """Where each segment's rows of a sampled signal begin, globally, and how many there are."""
    counts = unit_plan.rows_per_segment(positions)
    return {f"{signal}_row_start": first_row + np.cumsum(counts) - counts, f"{signal}_rows": counts}


def committed_units(objects: Objects, num_units: int) -> Iterator[Document | None]:
    """The record of each unit, or None."""
    for unit in range(num_units):
        yield find_document(objects, unit_key(unit))
