"""What grows with a cache and what does not, for synthetic plans of 10⁶ to 10¹⁰ tokens: opening, memory, objects, ledger.

Each plan is sealed for real but for its shards: manifest, packed records of every shard, metadata. Opening must be flat. Also how
many tokens of text, code and chats `plan` makes in a second, in one process and in several, and what 10¹⁰ tokens would take.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from run_kit.command_line import guarded
from signal_store.cache import open_cache
from signal_store.canonical import sha256
from signal_store.format.capacities import Capacities
from signal_store.format.text import segment_arrays, token_arrays
from signal_store.io.local import LocalObjects
from signal_store.io.shard_writer import write_unit_array
from signal_store.ledger.documents import MANIFEST, commit, seal_key
from signal_store.ledger.seal import Seal, constant_spec, group_of, units_group
from signal_store.manifest import (
    FORMAT_VERSION,
    CalibrationIdentity,
    Manifest,
    PlanIdentity,
    SourceIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from signal_store.sealed_part import SealedPart, sealed_metadata
from signal_store.signals import Dimensions, DistributionSignal, EveryNth, HiddenLayout, HiddenSignal, Signals
from stdlib_corpus import modules
from teacher_cache.commands.plan import plan
from teacher_cache.corpus import processes
from teacher_cache.recipe import CacheRecipe
from teacher_cache.worker import Worker

UNIT_TOKENS = 65_536
SEGMENTS_PER_UNIT = 160
TEACHER = Path(__file__).parents[1] / "demo_teacher"


def synthetic_manifest(tokens: int) -> Manifest:
    """A cache with distribution and hidden states."""
    capacities = Capacities(segments=256, hidden_rows=16_384, attention_rows=1, attention_entries=1, replay_rows=1)
    distribution = DistributionSignal.model_validate({})
    hidden = HiddenSignal(positions=EveryNth(every=4))
    stored = HiddenLayout(tap="block_output", layer=12, width=1024, rank=64, explained_variance=0.9)
    dimensions = Dimensions(
        unit_tokens=UNIT_TOKENS,
        vocab_size=32_768,
        hidden_size=1024,
        capacities=capacities,
        calibration={"tail_rank": 128, "tail_zigzag": True, "hidden": [stored.model_dump()]},
    )
    specs = [*token_arrays(UNIT_TOKENS), *segment_arrays(256), *distribution.arrays(dimensions), *hidden.arrays(dimensions)]
    digest = "sha256:" + "0" * 64
    teacher = TeacherIdentity(
        name="synthetic", revision=None, model_type="qwen3", config_digest=digest, weights_digest=digest, dtype="bfloat16",
        attn_implementation="sdpa", hidden_size=1024, num_layers=24, num_heads=16, max_positions=2048, logit_softcap=None,
    )  # fmt: skip
    source = SourceIdentity(
        name="synthetic",
        split="train",
        fingerprint=digest,
        num_documents=1,
        num_empty_documents=0,
        num_segments=1,
        num_tokens=tokens,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        teacher=teacher,
        tokenizer=TokenizerIdentity(digest=digest, vocab_size=32_768),
        sources=(source,),
        plan=PlanIdentity(
            digest=digest, text_digest=digest, overlay=False, context=1024, overlap=0, unit_tokens=UNIT_TOKENS, batch_tokens=8192,
            forward="packed", capacities=capacities,
        ),
        calibration=CalibrationIdentity(
            digest=digest, tail_rank=128, coverage=(0.9,) * 4, hidden=(stored,), attention=(), stats=None, replay_layers=()
        ),
        signals=Signals(distribution=distribution, hidden=hidden),
        arrays=tuple(spec.to_json() for spec in specs),
    )  # fmt: skip


def seal_synthetic(root: Path, tokens: int) -> int:
    """Everything of a sealed cache but its shards; returns the number of objects that the shards would be."""
    objects, manifest = LocalObjects(root), synthetic_manifest(tokens)
    units = max(1, tokens // UNIT_TOKENS)
    rng = np.random.default_rng(0)
    rows: dict[str, NDArray[np.generic]] = {f"{units_group(0)}/plan/revision": np.zeros(units, np.uint32)}
    rows[f"{units_group(0)}/plan/segments"] = np.full(units, SEGMENTS_PER_UNIT, np.uint32)
    rows[f"{units_group(0)}/plan/tokens"] = np.full(units, UNIT_TOKENS, np.uint32)
    rows[f"{units_group(0)}/plan/is_validation"] = np.zeros(units, np.uint8)
    shards = 0
    for spec in manifest.specs:
        count = units * spec.shards_per_unit
        shards += count
        group = group_of(spec.path, 0)
        rows[f"{group}/length"] = rng.integers(10**5, 10**6, count).astype(np.uint64)
        rows[f"{group}/index_crc32c"] = rng.integers(0, 2**32, count).astype(np.uint64)
        rows[f"{group}/chunk_crc32c"] = rng.integers(0, 2**32, (count, spec.chunks_per_shard)).astype(np.uint64)
        rows[f"{group}/sha256"] = rng.integers(0, 256, (count, 32)).astype(np.uint8)
    arrays, digests = [], {}
    for path, values in rows.items():
        spec = constant_spec(path, values)
        for shard, record in enumerate(write_unit_array(objects, ".", spec, 0, values)):
            digests[spec.shard_key(shard)] = record.sha256
        arrays.append({**spec.to_json(), "rows": len(values)})
    commit(objects, MANIFEST, manifest.model_dump(mode="json"), "0")
    seal = Seal(
        cache_id=manifest.cache_id, generation=0, parent=None, num_units=units, num_segments=units * SEGMENTS_PER_UNIT,
        content_digest="sha256:0", metadata={}, constant_arrays=tuple(arrays), constants=digests, tokenizer={}, ledger={}, sources=(),
    )  # fmt: skip
    metadata = sealed_metadata(manifest, seal)
    for key, data in metadata.items():
        objects.put(key, data)
    commit(objects, seal_key(0), {**seal.to_body(), "metadata": {k: sha256(d) for k, d in metadata.items()}}, "0")
    return shards


def seconds_to_open(root: Path) -> tuple[float, float]:
    """(open and say how long it is, then find the checks of a shard in the middle), best of three, metadata not remembered."""
    from signal_store.format import hierarchy

    opened, located = [], []
    for _ in range(3):
        hierarchy._hierarchy_metadata.cache_clear()  # noqa: SLF001
        started = time.perf_counter()
        cache = open_cache(root)
        assert len(cache)
        between = time.perf_counter()
        part: SealedPart = cache.base
        group = part.group
        middle = int(group[f"{units_group(0)}/plan/segments"].shape[0]) // 2  # type: ignore[union-attr]
        _ = group[f"{group_of('distribution/scalars', 0)}/length"][middle : middle + 1]  # type: ignore[index]
        opened.append(between - started)
        located.append(time.perf_counter() - between)
    return min(opened), min(located)


def write_corpora(folder: Path, size: int) -> dict[str, dict[str, Any]]:
    """Sources of about `size` characters each, of the standard library: as plain text, as code with keywords, as chats of four
    turns."""
    texts = [module.text for module in islice(modules(), 2_000)]
    texts = texts[: 1 + int(np.searchsorted(np.cumsum([len(text) for text in texts]), size))]
    plain, chats = folder / "plain.jsonl", folder / "chats.jsonl"
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cuts = [text[at : at + 1600] for text in texts for at in range(0, len(text) - 1600, 1600)]
    roles = ("user", "assistant", "user", "assistant")
    turns = [[{"role": role, "content": cut[400 * n : 400 * (n + 1)]} for n, role in enumerate(roles)] for cut in cuts]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return {
        "plain text": {"jsonl": plain},
        "code": {"jsonl": plain, "lexer": "python"},
        "chats": {"jsonl": chats, "messages": "messages"},
    }


def plan_rate(folder: Path, source: dict[str, Any], workers: int) -> tuple[int, float, float]:
    """Tokens of a plan, its seconds, and this process's seconds on a core; processes beside this one are warm."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process: so they compare
    made_from = {"name": "bench", "on_bad_row": "skip", **source}
    teacher = {"model": str(TEACHER), "dtype": "float32"}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        content = {"cache": f"{name}/cache.zarr", "teacher": teacher, "context": 256, "sources": [made_from]}
        recipe = CacheRecipe.model_validate(content)
        started, busy = time.perf_counter(), time.process_time()
        planned = plan(recipe, Worker(processes=workers))
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return sum(unit["tokens"] for unit in planned.units), seconds, busy


def plan_rates(size: int, rounds: int, most: int) -> list[dict[str, Any]]:
    """By kind of text and number of processes, the median of rounds taken in turns."""
    processes.ALONE_SECONDS = 0.0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, source in write_corpora(folder, size).items():
            plan_rate(folder, {**source, "max_documents": 8}, most)
            measured: dict[int, list[tuple[int, float, float]]] = {workers: [] for workers in (1, most)}
            for _ in range(rounds):
                for workers, found in measured.items():
                    found.append(plan_rate(folder, source, workers))
            for workers, found in measured.items():
                tokens, rate = found[0][0], statistics.median(tokens / seconds for tokens, seconds, _ in found)
                row = {"text": kind, "processes": workers, "tokens": tokens, "tokens_per_second": round(rate)}
                row |= {"lowest": round(min(t / s for t, s, _ in found)), "highest": round(max(t / s for t, s, _ in found))}
                if workers == 1:
                    row["tokens_per_core_second"] = round(statistics.median(t / busy for t, _, busy in found))
                rows.append({**row, "hours_for_1e10_tokens": round(1e10 / rate / 3600, 1)})
    return rows


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    words = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    flags = {name: any(word.startswith(name) for word in words) for name in ("avx2", "avx512", "amx")}
    return {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "cpu_flags": ", ".join(name if there else f"no {name}" for name, there in flags.items()),
        "date": date.today().isoformat(),
        "load_average": os.getloadavg()[0],
    }


def plan_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="tokens that plan makes in a second")
    for column in ("text", "processes", "tokens/s", "lowest to highest", "a core alone", "hours for 1e10"):
        table.add_column(column, justify="right")
    for row in rows:
        spread = f"{row['lowest']:,} to {row['highest']:,}"
        core = f"{row['tokens_per_core_second']:,}" if "tokens_per_core_second" in row else ""
        rate, hours = f"{row['tokens_per_second']:,}", f"{row['hours_for_1e10_tokens']:,.1f}"
        table.add_row(row["text"], str(row["processes"]), rate, spread, core, hours)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only", choices=("open", "plan"))
    parser.add_argument("--characters", type=int, default=4_000_000, help="of each kind of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="compared with one")
    args = parser.parse_args()
    file = args.out / "growth.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    if args.only != "open":
        before = machine()
        summary["plan"] = {**before, "rows": plan_rates(args.characters, args.rounds, args.processes)}
        Console(width=140).print(plan_table(summary["plan"]["rows"]))
    if args.only != "plan":
        summary |= opening()
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(summary, indent=1) + "\n")


def opening() -> dict[str, Any]:
    """What opening takes, by tokens."""
    rows: list[dict[str, Any]] = []
    table = Table(title="a cache grows")
    for column in (
        "tokens",
        "units",
        "shards",
        "objects per 10⁹ tokens",
        "open, ms",
        "first checks, ms",
        "ledger and metadata, MiB",
    ):
        table.add_column(column, justify="right")
    for exponent in (6, 7, 8, 9, 10):
        with tempfile.TemporaryDirectory() as name:
            root = Path(name) / "cache.zarr"
            shards = seal_synthetic(root, 10**exponent)
            opened, located = seconds_to_open(root)
            size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        units = max(1, 10**exponent // UNIT_TOKENS)
        per_billion = (shards + 2 * units) / 10**exponent * 1e9
        row = {"tokens": 10**exponent, "units": units, "shards": shards, "objects_per_1e9_tokens": per_billion}
        rows.append({**row, "open_seconds": opened, "first_checks_seconds": located, "packed_bytes": size})
        cells = (
            f"1e{exponent}",
            f"{units:,}",
            f"{shards:,}",
            f"{per_billion:,.0f}",
            f"{1000 * opened:.0f}",
            f"{1000 * located:.0f}",
        )
        table.add_row(*cells, f"{size / 2**20:.1f}")
    Console(width=140).print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"machine": platform.machine(), "rows": rows, "peak_bytes": peak}


if __name__ == "__main__":
    guarded(main)
