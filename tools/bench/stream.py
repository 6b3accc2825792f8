"""What the stream delivers: tokens a second as training-ready batches, of the distribution alone and of every signal, from a cold and a warm
page cache, by one process on one core, and by 1, 2 and 4 readers of one cache at the same time.

The ceiling is numpy.memmap over the same bytes, raw. Given a checkout of DistillKit, its way over the same tokens is measured in the same
run: a Parquet data set of its compressed rows, collated, and decoded by its own compressor.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from peers_distillkit import RECOMMENDED, DistillKit
from run_kit.command_line import guarded, keep_freed_memory
from signal_store.cache import Cache, open_cache
from student_train.data.codecs import Codecs
from student_train.data.request import TOKENS_ONLY, SignalRequest
from student_train.data.sections import StreamSection
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.data.stream import Stream

DISTRIBUTION = SignalRequest.of(DistributionRequest())


def stream_of(cache: Cache, request: SignalRequest, rank: int = 0, ranks: int = 1) -> Stream:
    rows = 16 * ranks
    config = StreamSection(sequence_length=max(1024, cache.manifest.plan.context), global_batch_rows=rows, lanes=4, workers=0)
    return Stream(cache, request, config, packed=True, rank=rank, world_size=ranks)


def delivered(stream: Stream, tokens: int) -> tuple[int, float, float]:
    """(real tokens, seconds, share of the rows' places that hold a token) of micro-batches that hold at least so many."""
    found = places = 0
    started = time.perf_counter()
    for batch in stream.micro_batches({}, 0):
        found += int(batch.real.sum())
        places += batch.real.numel()
        if found >= tokens:
            break
    return found, time.perf_counter() - started, found / places


def forget_pages(folder: Path) -> None:
    """Ask the system to drop a cache's files from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def reader(uri: str, rank: int, ranks: int, tokens: int, ready: Any, answer: Any) -> None:
    """One of several processes that read a cache at the same time: tokens a second."""
    torch.set_num_threads(1)
    keep_freed_memory()
    stream = stream_of(open_cache(uri), DISTRIBUTION, rank, ranks)
    delivered(stream, 1)
    ready.wait()
    found, seconds, _ = delivered(stream, tokens)
    answer.put(found / seconds)


def concurrent(uri: str, readers: int, tokens: int) -> list[float]:
    """Tokens a second of each."""
    context = multiprocessing.get_context("spawn")
    ready, answer = context.Barrier(readers), context.Queue()
    processes = [context.Process(target=reader, args=(uri, n, readers, tokens, ready, answer)) for n in range(readers)]
    for process in processes:
        process.start()
    found = [answer.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def memmap_rate(stream: Stream, tokens: int, folder: Path) -> float:
    """Tokens a second of raw rows of the same bytes, gathered from a memmap in the stream's rows of segments."""
    batch = next(stream.micro_batches({}, 0))
    part = batch.part(DistributionPart)
    assert part is not None
    codes = part.codes
    parts = (codes.head_ids, codes.head_codes, codes.tail_codes, codes.scalars)
    width = sum(part[0].numel() * part.element_size() for part in parts) + 2
    raw = np.memmap(folder / "raw.bin", dtype=np.uint8, mode="w+", shape=(tokens, width))
    raw[:] = 1
    lengths = np.full(tokens // 256, 256)
    order = np.random.default_rng(0).permutation(len(lengths))
    started = time.perf_counter()
    for first in range(0, len(order), 64):
        torch.from_numpy(np.concatenate([raw[n * 256 : n * 256 + 256] for n in order[first : first + 64]]))
    return len(order) * 256 / (time.perf_counter() - started)


def distillkit_rate(cache: Cache, checkout: Path, folder: Path, tokens: int) -> dict[str, float]:
    """Tokens a second of DistillKit's Parquet, collate and decode; of the same tokens' distributions, as this cache gives them."""
    from datasets import Dataset, load_dataset

    codec = Codecs.of(cache, DISTRIBUTION, torch.device("cpu")).distribution
    assert codec is not None
    compressor = DistillKit(checkout).codec(codec.vocab_size, RECOMMENDED, normalize_t=True)
    length = 256
    rows: list[dict[str, Any]] = []
    for batch in stream_of(cache, DISTRIBUTION).micro_batches({}, 0):
        part = batch.part(DistributionPart)
        assert part is not None
        for first in range(0, len(part.codes) - length + 1, length):
            logp = codec.logprobs(part.codes[slice(first, first + length)], 1.0)
            packed = compressor.compress(logp[None])
            row = {name: packed[name][0].tolist() for name in ("compressed_logprobs", "bytepacked_indices")}
            rows.append({"input_ids": batch.input_ids.flatten()[:length].tolist(), **row})
        if len(rows) * length >= tokens:
            break
    Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    table = load_dataset("parquet", data_files=str(folder / "data.parquet"), split="train", cache_dir=str(folder / "hf"))
    found = {}
    for name, decode in (("collated", False), ("collated and decoded", True)):
        started = time.perf_counter()
        for first in range(0, len(table) - 15, 16):
            examples = [table[n] for n in range(first, first + 16)]
            batch_of = {
                key: torch.tensor([example[key] for example in examples], dtype=torch.uint8) for key in list(examples[0])[1:]
            }
            torch.tensor([example["input_ids"] for example in examples])
            if decode:
                compressor.decompress_to_sparse(batch_of)
        found[name] = (len(table) // 16 * 16 * length) / (time.perf_counter() - started)
    return found


def measured(cache: Cache, tokens: int, rounds: int) -> Iterator[tuple[str, list[float], float]]:
    """(what, tokens a second by round, row fill) on one core; cold: from opening, most of the first epoch, read-ahead of the next included."""
    epoch = sum(source.num_tokens for source in cache.sources if source.split == "train") * 9 // 10
    for name, request in (("tokens", TOKENS_ONLY), ("distribution", DISTRIBUTION), ("every signal", SignalRequest.whole(cache))):
        for state, wanted in (("cold", epoch), ("warm", tokens)):
            rates = []
            for _ in range(rounds):
                if state == "cold":
                    forget_pages(Path(cache.parts[0].uri))
                found, seconds, fill = delivered(stream_of(open_cache(cache.parts[0].uri), request), wanted)
                rates.append(found / seconds)
            yield f"{name}, {state}", rates, fill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/demo/cache.zarr"))
    parser.add_argument("--tokens", type=int, default=3_600_000, help="delivered from a warm page cache, epoch after epoch")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many")
    parser.add_argument("--distillkit", type=Path, help="a checkout of arcee-ai/DistillKit")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    cache = open_cache(args.cache)
    found: dict[str, Any] = {"cache": cache.manifest.cache_id, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    found["tokens_per_second"], found["row_fill"], found["rounds"] = {}, {}, {}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    for what, rates, fill in measured(cache, args.tokens, args.rounds):
        found["tokens_per_second"][what], found["row_fill"][what] = statistics.median(rates), fill
        found["rounds"][what] = rates
    with tempfile.TemporaryDirectory() as name:
        found["tokens_per_second"]["numpy.memmap, raw"] = memmap_rate(stream_of(cache, DISTRIBUTION), args.tokens, Path(name))
        if args.distillkit is not None:
            for what, rate in distillkit_rate(cache, args.distillkit, Path(name), args.tokens // 32).items():
                found["tokens_per_second"][f"DistillKit, {what}"] = rate
    os.sched_setaffinity(0, cores)
    found["concurrent_tokens_per_second"] = {n: concurrent(str(args.cache), n, args.tokens // 2) for n in (1, 2, 4)}
    table = Table("what", "tokens/s", "rounds", "rows full", title="one core")
    for what, rate in found["tokens_per_second"].items():
        fill = found["row_fill"].get(what)
        rounds = found["rounds"].get(what, [])
        between = f"{min(rounds):,.0f} to {max(rounds):,.0f}" if rounds else ""
        table.add_row(what, f"{rate:,.0f}", between, "" if fill is None else f"{fill:.1%}")
    for readers, rates in found["concurrent_tokens_per_second"].items():
        table.add_row(f"distribution, {readers} readers at a time", f"{sum(rates):,.0f} in all", "", "")
    Console().print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stream.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    guarded(main)
