"""Bytes per token of a cache's codes under other codecs that stock zarr readers know: shuffle, order, zstd level, chunk length, delta.

Reads the codes of a cache; prints a table, best first, for each array, and JSON. What is stored now is marked.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from run_kit.command_line import guarded
from signal_store.cache import open_cache

ARRAYS = ("distribution/tail_codes", "distribution/head_ids", "distribution/head_codes", "distribution/scalars")
SHUFFLES = {"none": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
CHUNK_TOKENS = (1024, 4096, 16_384, 32_768)
LEVELS = (1, 3, 6, 9)


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to store an array."""

    array: str
    order: str
    shuffle: str
    level: int
    chunk_tokens: int
    bytes_per_token: float
    encode_mb_per_second: float


def orders(path: str, rows: NDArray[np.generic]) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """The rows in other orders and differences, all of them reversible by stock codecs or by the reader."""
    yield "token by token", rows
    yield "column by column", np.ascontiguousarray(rows.T)
    if path.endswith("head_ids"):
        deltas = np.diff(rows.astype(np.int64), axis=1, prepend=0).astype(np.uint32)
        yield "differences within a token", deltas
        yield "differences, column by column", np.ascontiguousarray(deltas.T)
        yield "as 16-bit ids", rows.astype(np.uint16)
    if path.endswith("tail_codes"):
        deltas = np.diff(rows.astype(np.int16), axis=0, prepend=np.zeros((1, rows.shape[1]), np.int16)).astype(np.int8)
        yield "differences between tokens, column by column", np.ascontiguousarray(deltas.T)


def trials(path: str, rows: NDArray[np.generic]) -> Iterator[Trial]:
    for chunk in CHUNK_TOKENS:
        if chunk > len(rows):
            continue
        whole = rows[: len(rows) // chunk * chunk]
        parts = [whole[i : i + chunk] for i in range(0, min(len(whole), 65_536), chunk)]
        for name in [name for name, _ in orders(path, rows[:2])]:
            ordered = [dict(orders(path, part))[name] for part in parts]
            for shuffle, number in SHUFFLES.items():
                for level in LEVELS:
                    if level != 6 and (chunk != 16_384 or shuffle == "bitshuffle"):
                        continue
                    started = time.perf_counter()
                    size = sum(len(blosc.compress(a, b"zstd", level, number, 0, a.dtype.itemsize)) for a in ordered)
                    seconds = time.perf_counter() - started
                    raw = sum(a.nbytes for a in ordered)
                    tokens = chunk * len(parts)
                    yield Trial(path, name, shuffle, level, chunk, size / tokens, raw / seconds / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    cache = open_cache(args.cache)
    unit_tokens = cache.manifest.plan.unit_tokens
    found: list[Trial] = []
    for path in ARRAYS:
        first = cache.read(path, 0, unit_tokens)
        used = int(cache.read("segments/length", 0, int(cache.segments_per_unit[0])).sum())
        own = sorted(trials(path, first[:used]), key=lambda t: t.bytes_per_token)
        found += own
        table = Table(title=f"{path} {first.dtype}{list(first.shape[1:])}")
        for column in ("order", "shuffle", "level", "chunk, tokens", "bytes/token", "encode, MB/s"):
            table.add_column(column, justify="left" if column in ("order", "shuffle") else "right")
        for t in own[:14]:
            cells = (
                t.order,
                t.shuffle,
                str(t.level),
                f"{t.chunk_tokens:,}",
                f"{t.bytes_per_token:.2f}",
                f"{t.encode_mb_per_second:.0f}",
            )
            table.add_row(*cells)
        Console(width=120).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "codec.json").write_text(json.dumps([asdict(t) for t in found], indent=1) + "\n")


if __name__ == "__main__":
    guarded(main)
