"""estimate: what a cache will cost, before the long run. Size, objects, teacher FLOPs, hours on this machine, a worker's memory.

The sizes come from calibration and from at least 64 segments, spread over the corpus, that are really encoded; plan and calibration
stay in the cache and are not made again. Without the teacher (`quick`) only a range can be given.
"""

import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from model_taps.loading import load_config
from run_kit.progress import progress_bar
from signal_store.errors import StorageError
from signal_store.format.arrays import ArraySpec
from signal_store.format.manifest import Capacities
from signal_store.io.local import LocalObjects
from signal_store.io.objects import Objects, objects_at
from signal_store.io.shard_writer import encode_chunk
from signal_store.ledger.documents import calibration_keys, plan_unit_key
from teacher_cache.builder.calibrate import Calibrated, batches_of, calibrate
from teacher_cache.builder.calibration_cost import fit_flops, search_flops
from teacher_cache.builder.calibration_fit import budget
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.planning import ensure_plan, settled
from teacher_cache.builder.positions import capacities_of
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.batch import UnitWork, extract_batch, plan_rows
from teacher_cache.teacher.forward import TeacherBatch
from teacher_cache.worker import ALONE, Worker

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


def estimate(recipe: CacheRecipe, *, quick: bool = False, worker: Worker = ALONE) -> Estimate:
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
    calibrated = calibrate(recipe, worker)
    objects = objects_at(recipe.cache)
    manifest, units = calibrated.manifest, calibrated.plan.units
    chosen = list(_spread_batches(calibrated, objects))
    rows: dict[str, list[NDArray[np.generic]]] = defaultdict(list)
    tokens, segments, seconds = 0, 0, 0.0
    extracted: set[str] = set()
    with progress_bar() as progress:
        bar = progress.add_task("probe", total=sum(_tokens(unit, batch) for _, unit, batch in chosen), unit="tokens")
        for number, unit, batch in chosen:
            started = time.perf_counter()
            for path, array in extract_batch(calibrated, UnitWork(manifest, number, unit), batch).rows.items():
                rows[path].append(array)
            seconds += time.perf_counter() - started
            extracted.update(rows)
            tokens += _tokens(unit, batch)
            segments += batch.last - batch.first
            progress.advance(bar, _tokens(unit, batch))
        for number in sorted({number for number, _, _ in chosen}):
            for path, array in plan_rows(UnitWork(manifest, number, calibrated.plan.unit(objects, number))).items():
                rows[path].append(array)
    needs = _whole_needs(settled(recipe), calibrated.plan, objects)
    sizes: dict[str, float] = defaultdict(float)
    encode_seconds = 0.0
    for spec in manifest.specs:
        started = time.perf_counter()
        per_row = _bytes_per_row(spec, rows.get(spec.path, []))
        encode_seconds += time.perf_counter() - started if spec.path in extracted else 0.0
        total_rows = _rows_of(spec, needs, sum(u["tokens"] for u in units))
        chunks = len(units) * spec.capacity_rows // spec.chunk_rows
        sizes[_signal(spec.path)] += per_row * total_rows + chunks * INDEX_ENTRY_BYTES + len(units) * spec.shards_per_unit * 4
    shards = len(units) * sum(spec.shards_per_unit for spec in manifest.specs)
    calibration = sum(objects.size(key) or 0 for key in calibration_keys(manifest.calibration.digest))
    plans = sum(objects.size(plan_unit_key(n, u["digest"])) or 0 for n, u in enumerate(units))
    sizes["ledger"] = plans + calibration + shards * RECORD_BYTES_PER_SHARD + _tokenizer_bytes(objects)
    sizes["calibration"] = 0.95 * calibration / 2
    sizes["metadata"] = (len(manifest.specs) * 5 + 8) * METADATA_BYTES_PER_ARRAY + len(units) * 60 * len(manifest.specs)
    total_tokens = sum(source.num_tokens for source in calibrated.plan.sources)
    total = round(sum(sizes.values()))
    rate = tokens / (max(seconds, encode_seconds) or 1.0)
    run_tokens = sum(u["tokens"] for u in units)  # what is context only is run too
    return Estimate(
        tokens=total_tokens,
        units=len(units),
        objects=shards + 2 * len(units) + 5 * len(manifest.specs) * 2 + 16,
        bytes_per_token={name: (size / total_tokens, size / total_tokens) for name, size in sizes.items()},
        total_bytes=(total, total),
        teacher_flops=forward_flops(recipe, run_tokens),
        calibration_flops=_calibration_flops(recipe, calibrated.plan),
        encoded_segments=segments,
        tokens_per_second=rate,
        hours=run_tokens / rate / 3600,
        worker_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        free_bytes=_free(objects),
    )


def _tokens(unit: UnitPlan, batch: TeacherBatch) -> int:
    return int(unit.length[batch.first : batch.last].sum())


def _spread_batches(calibrated: Calibrated, objects: Objects) -> Iterator[tuple[int, UnitPlan, TeacherBatch]]:
    """Batches spread evenly over the plan: at least MIN_SEGMENTS segments and MIN_TOKENS tokens, or all there is."""
    loaded = {n: calibrated.plan.unit(objects, n) for n in calibrated.plan.spread_units(MAX_UNITS_READ)}
    batches = [(n, unit, batch) for n, unit in loaded.items() for batch in batches_of(calibrated, unit)]
    tokens = np.asarray([_tokens(unit, batch) for _, unit, batch in batches])
    segments = np.asarray([batch.last - batch.first for _, _, batch in batches])
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
    total = dict.fromkeys(Capacities.model_fields, 0)
    tokens = 0
    for number in planned.spread_units(MAX_UNITS_READ):
        unit = planned.unit(objects, number)
        needs = capacities_of(unit, recipe.signals, recipe.resolved_max_columns)
        total = {name: total[name] + getattr(needs, name) for name in total}
        tokens += unit.num_tokens
    share = sum(u["tokens"] for u in planned.units) / max(1, tokens)
    return Capacities(**{name: round(rows * share) for name, rows in total.items()})


def _rows_of(spec: ArraySpec, needs: Capacities, tokens: int) -> int:
    """Rows of an array that hold something, in the whole cache."""
    axis = spec.dimension_names[0]
    if axis == "token":
        return tokens
    if axis == "segment":
        return needs.segments
    if axis == "entry":
        return needs.attention_entries
    return int(getattr(needs, f"{_signal(spec.path)}_rows"))


def _signal(path: str) -> str:
    return path.split("/")[0]


def _tokenizer_bytes(objects: Objects) -> int:
    return sum(objects.size(key) or 0 for key in objects.list("ledger/tokenizer"))


def forward_flops(recipe: CacheRecipe, tokens: int) -> float:
    """Of the teacher's forward passes: 2 for each weight that a token meets, the output head too, and 4·L·context·D/2 for
    attention."""
    config = _teacher_config(recipe)
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = getattr(config, "num_attention_heads", None) or 0  # none without attention
    head_dim = getattr(config, "head_dim", None) or (width // heads if heads else 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    moe = getattr(config, "moe_intermediate_size", None)
    ffn = 3 * width * (experts * moe if moe else inner)
    per_token = 2 * (layers * (attention + ffn) + width * config.vocab_size) + 2 * layers * recipe.context * heads * head_dim
    return float(per_token) * tokens


def _calibration_flops(recipe: CacheRecipe, planned: Plan) -> float:
    """Forward passes of the calibration's share, and the search of the distribution's codec."""
    config, signal = _teacher_config(recipe), recipe.signals.distribution
    width = config.hidden_size
    shared = budget(recipe.calibration.tokens_per_source, [source.num_tokens for source in planned.sources], width)
    tokens = sum(shared.by_source)
    if signal is None or signal.rank == 0:
        return forward_flops(recipe, tokens)
    held = round(tokens * shared.held_out_share)
    heads, temperatures = len(signal.head_sizes(planned.vocab_size)), len(signal.temperatures)
    search = search_flops(width, planned.vocab_size, held, heads, temperatures)
    return forward_flops(recipe, tokens) + fit_flops(width, planned.vocab_size, tokens - held) + search


def _teacher_config(recipe: CacheRecipe) -> PretrainedConfig:
    teacher = recipe.teacher
    config = load_config(teacher.model, what="teacher", revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    return config.get_text_config()


def _free(objects: Objects) -> int | None:
    if not isinstance(objects, LocalObjects):
        return None
    folder = next(parent for parent in (objects.root, *objects.root.resolve().parents) if parent.exists())
    return shutil.disk_usage(folder).free


BYTES_PER_TOKEN = {"distribution": (40.0, 250.0), "tokens": (1.5, 4.0), "ledger": (1.0, 6.0)}
"""What codes have been seen to take, from a very small teacher to a wide one of full rank."""


def _quick(recipe: CacheRecipe, worker: Worker) -> Estimate:
    """From plan and config alone."""
    planned = ensure_plan(recipe, worker)
    recipe = settled(recipe)
    objects = objects_at(recipe.cache)
    signals = recipe.signals
    config = _teacher_config(recipe)
    tokens = sum(source.num_tokens for source in planned.sources)
    ranges = {name: BYTES_PER_TOKEN[name] for name in ("tokens", "ledger")}
    if signals.distribution is not None:
        ranges["distribution"] = BYTES_PER_TOKEN["distribution"]
    needs = _whole_needs(recipe, planned, objects)
    if signals.hidden is not None:
        groups = len(signals.hidden.taps) * len(signals.hidden.layers or signals.hidden.depths)
        row = groups * ((signals.hidden.rank or config.hidden_size) * (1 if signals.hidden.values == "int8" else 2) + 4)
        ranges["hidden"] = (0.4 * row * needs.hidden_rows / tokens, 1.05 * row * needs.hidden_rows / tokens)
    if signals.distribution is not None and signals.distribution.samples:
        drawn = signals.distribution.samples * len(signals.distribution.temperatures)
        low, high = ranges["distribution"]
        ranges["distribution"] = (low + 0.5 * drawn, high + 4 * drawn)
    per_segment = needs.segments * config.num_hidden_layers / tokens
    if signals.stats is not None:
        ranges["stats"] = (0.0, per_segment * (8 * (getattr(config, "num_attention_heads", None) or 0) + 6))
    if signals.replay is not None:
        paths = signals.replay.steps + 1 + (len(signals.replay.layers or signals.replay.depths) if signals.replay.gradient else 0)
        row = 2 * config.hidden_size * paths * needs.replay_rows / tokens
        ranges["replay"] = (0.5 * row, 1.1 * row)
    if signals.evidence is not None:
        shares = (12 + 2 * len(signals.evidence.layers or signals.evidence.depths)) * needs.evidence_rows / tokens
        ranges["evidence"] = (0.2 * shares, 1.1 * shares)
    if signals.coverage is not None:
        words = 14 * needs.coverage_rows / tokens
        ranges["coverage"] = (0.2 * words, 1.1 * words)
    if signals.attention is not None:
        layers = 1 if signals.attention.layers == "last" else len(signals.attention.layers)
        heads = signals.attention.heads if isinstance(signals.attention.heads, int) else len(signals.attention.heads)
        entries = layers * heads * needs.attention_entries / tokens
        ranges["attention"] = (0.15 * entries, 1.1 * entries)
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
        calibration_flops=_calibration_flops(recipe, planned),
        encoded_segments=0,
        tokens_per_second=None,
        hours=None,
        worker_bytes=None,
        free_bytes=_free(objects),
    )
