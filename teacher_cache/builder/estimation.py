"""What a cache will cost, before the long run: size, objects, teacher FLOPs, hours on this machine, a worker's memory.

The sizes come from calibration and from at least 64 segments, spread over the corpus, that are really encoded; plan and calibration
stay in the cache and are not made again. Without the teacher (`quick`) only a range can be given.
"""

import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from run_kit.progress import progress_bar
from signal_store.errors import StorageError
from signal_store.format.arrays import ArraySpec
from signal_store.format.capacities import Capacities
from signal_store.io.local import LocalObjects
from signal_store.io.objects import Objects
from signal_store.io.shard_writer import encode_chunk
from signal_store.ledger.documents import calibration_keys, plan_unit_key
from teacher_cache.builder.calibrate import Calibrated, batches_of
from teacher_cache.builder.flops import calibration_flops, forward_flops, teacher_config
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.session import BuildSession
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.base import Scale, rows_of
from teacher_cache.signals.batch import extract_batch, plan_rows
from teacher_cache.signals.registry import capacities_of, extractors_of
from teacher_cache.signals.unit_work import UnitWork
from teacher_cache.teacher.batches import TeacherBatch
from teacher_cache.worker import Worker

MIN_SEGMENTS = 64
MIN_TOKENS = 32_768
MAX_UNITS_READ = 32
INDEX_ENTRY_BYTES = 16
RECORD_BYTES_PER_SHARD = 330
METADATA_BYTES_PER_ARRAY = 2_600
"""Of an array's zarr.json, its entry in the root's consolidated metadata, and those of its four packed columns."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Figures of a whole cache. Sizes in bytes; `bytes_per_token` by group of arrays, low and high the same unless quick."""

    tokens: int
    units: int
    objects: int
    bytes_per_token: dict[str, tuple[float, float]]
    total_bytes: tuple[int, int]
    teacher_flops: float
    calibration_flops: float
    """Of its matrix products, the teacher's forward passes among them."""
    encoded_segments: int
    tokens_per_second: float | None
    hours: float | None
    worker_bytes: int | None
    free_bytes: int | None


def estimate_of(recipe: CacheRecipe, worker: Worker, *, quick: bool) -> Estimate:
    """The estimate of a recipe; StorageError, with the numbers, where the target disk cannot hold the least of it."""
    found = _quick(recipe, worker) if quick else _encoded(recipe, worker)
    if found.free_bytes is not None and found.total_bytes[0] > found.free_bytes:
        raise StorageError(
            "the target disk cannot hold this cache",
            expected=f"{found.total_bytes[0]:,} bytes free",
            found=f"{found.free_bytes:,}",
            where=recipe.cache,
            remedy="Make room, or cache fewer signals, layers or positions.",
        )
    return found


def _encoded(recipe: CacheRecipe, worker: Worker) -> Estimate:
    session = BuildSession.ready(recipe, worker)
    recipe, objects, calibrated = session.recipe, session.objects, session.calibrated
    manifest, units, sources = calibrated.manifest, calibrated.plan.units, calibrated.plan.sources
    probe = _probed(calibrated, objects)
    sizes, encode_seconds = _sizes(calibrated, probe, _whole_needs(recipe, calibrated.plan, objects))
    shards = len(units) * sum(spec.shards_per_unit for spec in manifest.specs)
    calibration = sum(objects.size(key) or 0 for key in calibration_keys(manifest.calibration.digest))
    plans = sum(objects.size(plan_unit_key(n, u["digest"])) or 0 for n, u in enumerate(units))
    sizes["ledger"] = plans + calibration + shards * RECORD_BYTES_PER_SHARD + _tokenizer_bytes(objects)
    sizes["calibration"] = 0.95 * calibration / 2
    sizes["metadata"] = (len(manifest.specs) * 5 + 8) * METADATA_BYTES_PER_ARRAY + len(units) * 60 * len(manifest.specs)
    total_tokens = sum(source.num_tokens for source in sources)
    total = round(sum(sizes.values()))
    rate = probe.tokens / (max(probe.seconds, encode_seconds) or 1.0)
    run_tokens = sum(u["tokens"] for u in units)  # what is context only is run too
    return Estimate(
        tokens=total_tokens,
        units=len(units),
        objects=shards + 2 * len(units) + 5 * len(manifest.specs) * 2 + 16,
        bytes_per_token={name: (size / total_tokens, size / total_tokens) for name, size in sizes.items()},
        total_bytes=(total, total),
        teacher_flops=forward_flops(recipe, run_tokens),
        calibration_flops=calibration_flops(recipe, calibrated.plan),
        encoded_segments=probe.segments,
        tokens_per_second=rate,
        hours=run_tokens / rate / 3600,
        worker_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        free_bytes=_free(objects),
    )


@dataclass(slots=True)
class _Probe:
    """Rows by array of the batches that were really run, and what that took; `extracted`: the arrays that the teacher fills."""

    rows: dict[str, list[NDArray[np.generic]]] = field(default_factory=lambda: defaultdict(list))
    extracted: set[str] = field(default_factory=set)
    tokens: int = 0
    segments: int = 0
    seconds: float = 0.0


def _probed(calibrated: Calibrated, objects: Objects) -> _Probe:
    chosen, probe = list(_spread_batches(calibrated, objects)), _Probe()
    with progress_bar() as progress:
        bar = progress.add_task("probe", total=sum(_tokens(work.plan, batch) for work, batch in chosen), unit="tokens")
        for work, batch in chosen:
            started = time.perf_counter()
            for path, array in extract_batch(calibrated, work, batch).rows.items():
                probe.rows[path].append(array)
            probe.seconds += time.perf_counter() - started
            probe.tokens += _tokens(work.plan, batch)
            probe.segments += batch.last - batch.first
            progress.advance(bar, _tokens(work.plan, batch))
    probe.extracted.update(probe.rows)
    for work in {work.number: work for work, _ in chosen}.values():
        for path, array in plan_rows(calibrated, work).items():
            probe.rows[path].append(array)
    return probe


def _sizes(calibrated: Calibrated, probe: _Probe, needs: Capacities) -> tuple[dict[str, float], float]:
    """Stored bytes of all units by group of arrays; and the seconds that encoding took of what the teacher fills."""
    units = calibrated.plan.units
    sizes: dict[str, float] = defaultdict(float)
    seconds = 0.0
    for spec in calibrated.manifest.specs:
        started = time.perf_counter()
        per_row = _bytes_per_row(spec, probe.rows.get(spec.path, []))
        seconds += time.perf_counter() - started if spec.path in probe.extracted else 0.0
        total_rows = rows_of(spec, needs, sum(u["tokens"] for u in units))
        chunks = len(units) * spec.capacity_rows // spec.chunk_rows
        index = chunks * INDEX_ENTRY_BYTES + len(units) * spec.shards_per_unit * 4
        sizes[spec.path.split("/")[0]] += per_row * total_rows + index
    return sizes, seconds


def _tokens(unit: UnitPlan, batch: TeacherBatch) -> int:
    return int(unit.length[batch.first : batch.last].sum())


def _spread_batches(calibrated: Calibrated, objects: Objects) -> Iterator[tuple[UnitWork, TeacherBatch]]:
    """Batches spread evenly over the plan: at least MIN_SEGMENTS segments and MIN_TOKENS tokens, or all there is."""
    loaded = [UnitWork(n, calibrated.plan.unit(objects, n)) for n in calibrated.plan.spread_units(MAX_UNITS_READ)]
    batches = [(work, batch) for work in loaded for batch in batches_of(calibrated, work.plan)]
    tokens = np.asarray([_tokens(work.plan, batch) for work, batch in batches])
    segments = np.asarray([batch.last - batch.first for _, batch in batches])
    wanted = max(MIN_TOKENS / tokens.mean(), MIN_SEGMENTS / segments.mean(), 4)
    for place in np.unique(np.linspace(0, len(batches) - 1, min(len(batches), int(np.ceil(wanted)))).round().astype(int)):
        yield batches[place]


def _bytes_per_row(spec: ArraySpec, rows: list[NDArray[np.generic]]) -> float:
    """Stored bytes of a row, encoded chunk by chunk as fill writes them."""
    if not rows:
        return 0.0
    joined = np.concatenate(rows)
    size = 0
    for start in range(0, len(joined), spec.chunk_rows):
        size += len(encode_chunk(joined[start : start + spec.chunk_rows], spec)[0])
    return size / max(1, len(joined))


def _whole_needs(recipe: CacheRecipe, planned: Plan, objects: Objects) -> Capacities:
    """Rows of the sampled signals in all units together, from the units that were read; `recipe` is settled."""
    total = Capacities()
    tokens = 0
    for number in planned.spread_units(MAX_UNITS_READ):
        unit = planned.unit(objects, number)
        total = total.plus(capacities_of(unit, recipe.signals, recipe.context))
        tokens += unit.num_tokens
    share = sum(u["tokens"] for u in planned.units) / max(1, tokens)
    return Capacities(**{name: round(rows * share) for name, rows in total.model_dump().items()})


def _tokenizer_bytes(objects: Objects) -> int:
    return sum(objects.size(key) or 0 for key in objects.list("ledger/tokenizer"))


def _free(objects: Objects) -> int | None:
    if not isinstance(objects, LocalObjects):
        return None
    folder = next(parent for parent in (objects.root, *objects.root.resolve().parents) if parent.exists())
    return shutil.disk_usage(folder).free


TEXT_BYTES = {"tokens": (1.5, 4.0), "ledger": (1.0, 6.0)}
"""What text has been seen to take of a token."""


def _quick(recipe: CacheRecipe, worker: Worker) -> Estimate:
    """From plan and config alone."""
    session = BuildSession.of(recipe, worker).planned()
    recipe, objects, planned = session.recipe, session.objects, session.plan
    tokens = sum(source.num_tokens for source in planned.sources)
    scale = Scale(teacher_config(recipe), tokens, planned.vocab_size, _whole_needs(recipe, planned, objects))
    ranges = {**TEXT_BYTES, **{e.name: e.bytes_per_token(scale) for e in extractors_of(recipe.signals, recipe.context)}}
    return Estimate(
        tokens=tokens,
        units=planned.num_units,
        objects=0,
        bytes_per_token=ranges,
        total_bytes=(
            round(tokens * sum(low for low, _ in ranges.values())),
            round(tokens * sum(high for _, high in ranges.values())),
        ),
        teacher_flops=forward_flops(recipe, sum(unit["tokens"] for unit in planned.units)),
        calibration_flops=calibration_flops(recipe, planned),
        encoded_segments=0,
        tokens_per_second=None,
        hours=None,
        worker_bytes=None,
        free_bytes=_free(objects),
    )
